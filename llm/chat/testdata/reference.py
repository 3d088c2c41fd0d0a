"""Writes reference.json: what Jinja, set up as Hugging Face's transformers does, makes of chat templates.

Needs: pip install jinja2==3.1.6 gguf, and the files of scripts/models.
Run as: python3 reference.py > reference.json
"""
import json, os, sys
from datetime import datetime
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from gguf import GGUFReader

cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "atoll", "models")


def raise_exception(message):
    raise Exception(message)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = lambda f: datetime(2026, 2, 3, 4, 5, 6).strftime(f)

user = {"role": "user", "content": "Hi, it's \"me\" & <you>!\n"}
conversations = {
    "one": [user],
    "system": [{"role": "system", "content": "Be brief."}, user],
    "turns": [user, {"role": "assistant", "content": "  Hello. "}, {"role": "user", "content": "And é 中文 🦥?"}],
    "thinking": [user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}, user],
    "tools": [{"role": "user", "content": "Weather in Paris?"},
              {"role": "assistant", "content": "", "tool_calls": [{"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2, "unit": None}}}]},
              {"role": "tool", "tool_call_id": "123456789", "name": "weather", "content": "{\"t\": 21.5}"},
              {"role": "assistant", "content": "21.5 degrees."}, user],
    "wrong order": [{"role": "assistant", "content": "I begin."}, user],
    "two users": [user, user],
    "nobody": [],
}
tools = [{"type": "function", "function": {"name": "weather", "description": "It's the \"weather\" <b>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "required": ["city"]}}}]

snippets = """a\n{% if true %}\nb\n{% endif %}\nc\n
  {%- if true -%}  x  {%- endif -%}  y
   {% if true %}  x{% endif %}   \n z
x {#- c -#} y {# d #}\n z
  {#  c #}\nq
{%+ if true %} a{% endif +%}\nb
{{ 1 }}\n{{ 2 }}
{{- 'a' -}}  b
{{ [1, 'a', none, true, 1.5, {'k': "it's"}] }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** 0.5 }} {{ 1e3 if false else 3.0 }}
{{ 'a' ~ 1 ~ none }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ not true or true and false }}
{{ 'x' if false }}|{{ undefined_name }}|{{ undefined_name is defined }}|{{ undefined_name | default('d') }}|{{ '' | default('e', true) }}|{{ none | default('n') }}
{% for i in range(3) %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}
{% for i in range(10) if i is odd %}{{ i }}{% if i == 5 %}{% break %}{% endif %}{% endfor %}
{% for i in range(4) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{{ loop.previtem is defined }}{{ loop.nextitem }}{% endfor %}
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}
{% set ns = namespace(n=0, s='') %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}
{% set t %}block {{ 1 + 1 }}{% endset %}[{{ t }}]
{% macro f(a, b='d', c=none) %}<{{ a }}{{ b }}{{ c }}>{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(b=3, a=4) }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}
{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abcdef'[1:4] }}{{ [1,2,3][::-1] }}{{ [1,2,3][:-1] }}{{ 'abc'[::-1] }}{{ [1,2,3,4][1::2] }}
{{ '  a b '.strip() }}|{{ ' a '.lstrip() }}|{{ 'xxaxx'.rstrip('x') }}|{{ 'a,b'.split(',') }}|{{ ' a  b '.split() }}|{{ 'a-b-c'.split('-', 1)[-1] }}
{{ 'Hello'.startswith('He') }}{{ 'Hello'.endswith(('x', 'lo')) }}{{ 'a' in 'abc' }}{{ 'a' not in ['b'] }}{{ 'k' in {'k': 1} }}
{{ 'hello world' | title }} {{ 'HELLO' | capitalize }} {{ ' x ' | trim }} {{ 'abc' | length }} {{ [1,2] | join(', ') }} {{ 'a' | upper }}
{{ [3,1,2] | sort }} {{ ['b','A'] | sort }} {{ [1,1,2] | unique | list }} {{ [1,2,3] | first }} {{ [1,2,3] | last }} {{ [1,2] | reverse | list }}
{{ [{'a': 1}, {'a': 2}, {'b': 3}] | selectattr('a', 'defined') | map(attribute='a') | list }} {{ [1,2,3,4] | select('even') | list }} {{ [0,1] | reject | list }}
{{ [{'a': 'x'}, {'a': 'y'}] | selectattr('a', 'equalto', 'y') | list | length }} {{ ['a','b'] | map('upper') | join }} {{ [{'r':'a'}] | rejectattr('r', 'equalto', 'a') | list }}
{{ {'b': 1, 'a': [1, 2.5, none, true, "q\\"'<&>\\n"]} | tojson }}
{{ {'b': 1, 'a': [], 'c': {}, 'd': [1, {'x': 2}]} | tojson(indent=2) }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1, 'a': 2} | items | list }}
{{ 'a\\nb' | indent(2) }}|{{ 'a\\n\\nb' | indent(2, true) }}
{{ '5' | int + 1 }} {{ 'x' | int }} {{ 3.7 | int }} {{ '2.5' | float }} {{ -3 | abs }} {{ true + 1 }}
{{ 'a' is string }}{{ 1 is number }}{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is iterable }}{{ none is none }}{{ 4 is divisibleby 2 }}{{ 1 is not none }}{{ true is boolean }}{{ 1 is integer }}{{ 1.0 is float }}{{ 'a' is in ['a'] }}
{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M') }}
{{ raise_exception('no: ' ~ 1) }}
{{ undefined_name.x }}
{{ {'a': 1}.b }}|{{ {'a': 1}['b'] }}|{{ {'a': 1}.get('b') }}|{{ {'a': 1}.get('b', 2) }}|{{ {'items': 1}['items'] }}
{{ 1 + 'a' }}
{{ [1][5] }}
{{ 'a"b' }}{{ "it's" }}{{ 'x\\ty\\\\z' }}
{% generation %}g{% endgeneration %}
{{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e100 if false else 123456789012345 }} {{ 10000000000000000.0 }} {{ 0.00001 }}
{{ (1, 2)[1] }} {{ 'a' 'b' }} {{ not false }} {{ -(1 + 2) }} {{ 2 - 1 - 1 }} {{ 'A' < 'B' }}
{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }} {% endfor %}{{ range(5) | list }} {{ range(1, 10, 3) | list }}
{% set a, b = 1, 2 %}{{ a }}{{ b }} {{ 'ab' | replace('a', 'x') }} {{ 'a b a'.replace('a', 'c', 1) }} {{ 'abc'.find('c') }}
{% if messages and messages[0].role == 'x' %}1{% elif not messages %}2{% else %}3{% endif %}
{{ '%s' }}{{ '{}' }} {{ '<b>' | e }}""".split("\n")
snippets = [s.replace("\\n", "\n").replace("\\\\", "\\") if not s.startswith("{{ {") and "\\t" not in s and "indent" not in s else s for s in snippets]

config = lambda n: json.load(open(f"{cache}/{n}/tokenizer_config.json"))["chat_template"]
templates = {n: config(n) for n in ("llama3", "qwen3", "gemma3")}
templates["smollm2"] = GGUFReader(f"{cache}/smollm2-135m-instruct-q4_1.gguf").fields["tokenizer.chat_template"].contents()


def render(template, **named):
    try:
        return {"text": env.from_string(template).render(bos_token="<s>", eos_token="</s>", **named)}
    except Exception as e:
        return {"error": str(e)}


out = {"conversations": conversations, "tools": tools, "templates": templates, "cases": [], "snippets": []}
for name, template in templates.items():
    for conversation, messages in conversations.items():
        for with_tools in (False, True):
            for answer in (False, True):
                for more in ({}, {"enable_thinking": False}):
                    if more and name != "qwen3":
                        continue
                    got = render(template, messages=messages, tools=tools if with_tools else None, add_generation_prompt=answer, **more)
                    out["cases"].append({"template": name, "conversation": conversation, "tools": with_tools, "answer": answer, "more": more, **got})
for s in snippets:
    out["snippets"].append({"template": s, **render(s.replace("{% generation %}", "").replace("{% endgeneration %}", ""), messages=[], tools=None, add_generation_prompt=False)})
json.dump(out, sys.stdout, separators=(",", ":"))
print()
