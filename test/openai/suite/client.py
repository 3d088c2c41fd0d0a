"""What programs do with OpenAI's client, against a small real model."""
import json
import os
import time
import urllib.request

import openai

client = openai.OpenAI()
MODEL = "smollm2"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def fails(kind, code, call, **more):
    try:
        call(**more)
    except kind as e:
        assert e.code == code, (e.code, code, e.message)
        return e
    raise AssertionError(f"{kind.__name__} was not raised")


def models():
    assert MODEL in [m.id for m in client.models.list()]
    assert client.models.retrieve(MODEL).object == "model"
    fails(openai.NotFoundError, "model_not_found", client.models.retrieve, model="none")


def chat():
    r = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
    assert r.object == "chat.completion" and r.id.startswith("chatcmpl-")
    assert r.choices[0].message.content and r.choices[0].message.role == "assistant"
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    again = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
    assert again.choices[0].message.content == r.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens  # a kept answer
    two = client.chat.completions.create(model=MODEL, messages=PARIS, n=2, seed=5, max_tokens=8)
    assert [c.index for c in two.choices] == [0, 1]
    short = client.chat.completions.create(model=MODEL, messages=PARIS, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def stream():
    begun, text, first, usage, finish = time.monotonic(), "", None, None, None
    for c in client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0.5, seed=3, max_tokens=24, stream=True,
                                            stream_options={"include_usage": True}):
        if c.usage:
            usage = c.usage
        for choice in c.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            if text and first is None:
                first = time.monotonic() - begun
    whole = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0.5, seed=3, max_tokens=24)
    assert text == whole.choices[0].message.content, (text, whole.choices[0].message.content)
    assert usage.completion_tokens > 0 and finish in ("stop", "length")
    print(f"measured: L1 first streamed token after {first * 1000:.0f} ms, {usage.completion_tokens} tokens")


def stop_and_logprobs():
    whole = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20).choices[0].message.content
    stop = whole[len(whole) // 2:][:4]
    r = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20, stop=[stop], logprobs=True, top_logprobs=3)
    assert r.choices[0].message.content == whole[:whole.index(stop)] and r.choices[0].finish_reason == "stop"
    for t in r.choices[0].logprobs.content:
        assert t.logprob <= 0 and len(t.top_logprobs) == 3 and bytes(t.bytes).decode(errors="replace") == t.token, t
        assert t.logprob == max(x.logprob for x in t.top_logprobs)  # the likeliest was taken


def forms():
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}
    ask = [{"role": "user", "content": "Invent a person, as JSON."}]
    r = client.chat.completions.create(model=MODEL, messages=ask, max_tokens=80, seed=1,
                                       response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}})
    person = json.loads(r.choices[0].message.content)
    assert set(person) == {"name", "age"} and isinstance(person["age"], int), person
    fails(openai.BadRequestError, None, client.chat.completions.create, model=MODEL, messages=ask,
          response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}, "strict": True}})


def tools():
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather in a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": False}}}
    ask = [{"role": "user", "content": "How is the weather in Lisbon?"}]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        r = client.chat.completions.create(model=MODEL, messages=ask, tools=[tool], tool_choice=choice, max_tokens=60, temperature=0)
        call = r.choices[0].message.tool_calls[0]
        assert r.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
        assert list(json.loads(call.function.arguments)) == ["city"]
    args, name = "", None
    for c in client.chat.completions.create(model=MODEL, messages=ask, tools=[tool], tool_choice="required", max_tokens=60, stream=True):
        for t in (c.choices[0].delta.tool_calls or []) if c.choices else []:
            name, args = t.function.name or name, args + (t.function.arguments or "")
    assert name == "weather" and "city" in json.loads(args)
    r = client.chat.completions.create(model=MODEL, tools=[tool], max_tokens=30, messages=ask + [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Lisbon"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 24 degrees"}])
    assert r.choices[0].message


def texts():
    r = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=6, temperature=0, logprobs=1)
    assert r.choices[0].text.startswith(" 5"), r.choices[0].text
    assert len(r.choices[0].logprobs.tokens) == 6
    parts = [c.choices[0].text for c in client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=6, temperature=0, stream=True)]
    assert "".join(parts) == r.choices[0].text
    both = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=1)
    assert [c.index for c in both.choices] == [0, 1]


def embeddings():
    r = client.embeddings.create(model=MODEL, input=["a cat on a sofa", "a kitten on a couch", "tax law"])  # asks for base64
    a, b, c = (e.embedding for e in r.data)
    dot = lambda x, y: sum(p * q for p, q in zip(x, y))
    assert abs(dot(a, a) - 1) < 1e-3 and dot(a, b) > dot(a, c)
    assert client.embeddings.create(model=MODEL, input="a cat on a sofa", encoding_format="float", dimensions=64).usage.prompt_tokens > 0


def errors():
    chat = client.chat.completions.create
    e = fails(openai.BadRequestError, "context_length_exceeded", chat, model=MODEL, messages=[{"role": "user", "content": "reef " * 20000}])
    assert e.param == "messages" and e.type == "invalid_request_error"
    fails(openai.NotFoundError, "model_not_found", chat, model="none", messages=PARIS)
    fails(openai.BadRequestError, None, chat, model=MODEL, messages=PARIS, temperature=3)
    fails(openai.BadRequestError, None, chat, model=MODEL, messages=[])
    fails(openai.BadRequestError, None, chat, model=MODEL, messages=[{"role": "stranger", "content": "x"}])
    fails(openai.AuthenticationError, "invalid_api_key", openai.OpenAI(api_key="wrong").models.list)


def gone():
    """A client that leaves in the middle of an answer frees its place."""
    with client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Tell a very long story."}], stream=True, max_tokens=4000) as s:
        for _ in range(3):
            next(s)
    root = {"Authorization": "Bearer " + open(os.environ["ATOLL_HOME"] + "/credentials").read().strip()}
    for _ in range(200):
        text = urllib.request.urlopen(urllib.request.Request(str(client.base_url).replace("/v1/", "/metrics"), headers=root)).read().decode()
        if 'atoll_model_running{model="smollm2"} 0' in text:
            assert "atoll_model_first_token_seconds_bucket" in text
            return
        time.sleep(0.05)
    raise AssertionError("the answer goes on without its client")


for f in (models, chat, stream, stop_and_logprobs, forms, tools, texts, embeddings, errors, gone):
    f()
    print("ok", f.__name__)
