"""Writes reference.json: what Hugging Face's tokenizers make of hard texts.

Needs: pip install tokenizers==0.23.3 sentencepiece==0.2.3 gguf, and the files of scripts/models.
Run as: python3 reference.py > reference.json
"""
import json, os, random, sys
import sentencepiece
from tokenizers import Tokenizer, AddedToken, Regex, models, pre_tokenizers, decoders

cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "atoll", "models")

texts = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n \n ", "\t\t\tx", "a\n", "a\r\nb\r\n\r\nc", "\r", "a  b", "a   b    c",
    "Hello, world!", "Hello World", " Hello World", "hello   world  ", "The quick brown fox jumps over the lazy dog.",
    "I'm you're he's they'll we'd I've can't DON'T WE'LL I'D 'S 'tis rock'n'roll '' ''' 's'", "'ſ 'ſt", "o'clock's",
    "1", "12", "123", "1234", "12345", "1234567890123", "3.14159", "1,000,000.00", "0x1F 1e-9 ½ ² ٣٤٥ Ⅷ 一二三 1a2b3c", " 1 22 333 4444", "v1.2.3-rc4",
    "Führer über Straße ÀÉÎÕÜ naïve café", "cafe\u0301 nai\u0308ve A\u030a \u212b \ufb01n", "Привет, мир! Как дела?", "Γειά σου Κόσμε", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "你好，世界！今天天气怎么样？", "こんにちは世界。カタカナ ひらがな", "안녕하세요 세계", "한국어와 日本語 mixed 中文",
    "😀", "😀😃😄 😁", "👨‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪🇫🇷 flags", "👍🏽 ok 👌🏿", "a😀b", "✨ ★ ☃ ♥ → ∑ ∫ √ ≠ ≤", "\U0001F9A5\U0001FAE0\U0001F6DE",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tdef g(self):\n\t\tpass\n", "for (int i = 0; i < n; i++) { a[i] += b[i] * c; } // loop", "#include <stdio.h>\nint main(void){printf(\"%d\\n\",1);return 0;}",
    "SELECT * FROM t WHERE a='b' AND c>=1;--x", "{\"key\": [1, 2.5, null, true], \"s\": \"\\u00e9\"}", "<div class=\"a\">x &amp; y</div>", "https://example.org/a/b?c=d&e=%20f#g", "$x = @{a=1}; `cmd` && ||  !== ===",
    "camelCaseWord XMLHttpRequest snake_case_word SCREAMING_CASE kebab-case", "....", "---", "***bold*** _it_", "!!!???", "a,b;c:d", "(a)[b]{c}", "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./",
    "\x00\x01\x02\x1b[31mred\x1b[0m\x7f", "a\u00a0b\u2003c\u3000d\u202fe\u2028f\u2029g\u0085h", "\u200bzero\u200dwidth\ufeff", "\ufffd \ufffe", "\u0e33\u0301", "i\u0307 \u0130 \u0131 ß ẞ ς ﬀ",
    "a" * 100, "ab" * 60, " " * 20 + "x", "\n" * 20 + "x", "=" * 80, "-" * 33, "The the THE tHe", "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "<s>", "</s>", "<|im_start|>user\nhi<|im_end|>\n", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "<start_of_turn>user\nhi<end_of_turn>\n", "<bos>x<eos>", "<|endoftext|>", "<think>\nok\n</think>\n\n", "x <|im_end|> y", "<|im_end", "<unk> [INST] hi [/INST]", "<0x0A>", "▁a▁▁b",
    "<table><tr><td>1</td></tr></table>", "a\n\n\n\nb", "a\t\tb", "  leading", "trailing  ", "\tdef x():\n\t\treturn\n", "line1\n  line2\n    line3\n", "x = 1  # comment\n\n", "1+1=2", "50% off $19.99 €20 £5 ¥100", "Mr. O'Neill's e-mail: o.neill@example.com",
]
rng = random.Random(7)
alphabets = [
    [chr(c) for c in range(32, 127)],
    list(" \t\n\r a1'.é中"),
    [chr(c) for r in [(0x20, 0x7f), (0xa0, 0x180), (0x370, 0x400), (0x400, 0x460), (0x4e00, 0x4e80), (0x3040, 0x30a0), (0x1f600, 0x1f640), (0x2000, 0x2030), (0x300, 0x320), (0xac00, 0xac40)] for c in range(*r)],
    list("'sStTrReEvVlLdDmM  aZ1\n"),
    list("0123456789 .,a"),
    list("AaBbÀàǅʰªM\u0301中 /\n.,'1"),
]
for i in range(120):
    a = alphabets[i % len(alphabets)]
    texts.append("".join(rng.choice(a) for _ in range(rng.randint(1, 60))))


def gguf_bpe(path):
    """The tokenizer of SmolLM2, of its GGUF file's vocabulary; cut as Hugging Face has it."""
    from gguf import GGUFReader
    f = GGUFReader(path).fields
    tokens, types, merges = (f["tokenizer.ggml." + k].contents() for k in ("tokens", "token_type", "merges"))
    vocab = {t: i for i, t in enumerate(tokens)}
    t = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, normalized=False, special=True) for x, k in zip(tokens, types) if k == 3])
    return t


tokenizers = {n: Tokenizer.from_file(f"{cache}/{n}/tokenizer.json") for n in ("llama2", "llama3", "qwen3", "gemma3")}
tokenizers["smollm2"] = gguf_bpe(f"{cache}/smollm2-135m-instruct-q4_1.gguf")
tekken = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")

out = {"texts": texts, "ids": {}, "decoded": {}, "tekken": [[w for w, _ in tekken.pre_tokenize_str(t)] for t in texts]}
for name, t in sorted(tokenizers.items()):
    ids = [t.encode(x, add_special_tokens=False).ids for x in texts]
    out["ids"][name] = ids
    out["decoded"][name] = [t.decode(i, skip_special_tokens=True) for i in ids]
sp = sentencepiece.SentencePieceProcessor(model_file=f"{cache}/mistral/tokenizer.model")
out["ids"]["mistral"] = [sp.encode(x) for x in texts]
out["decoded"]["mistral"] = [sp.decode(i) for i in out["ids"]["mistral"]]
# Most texts come back as they were; only others are kept.
for name, d in out["decoded"].items():
    out["decoded"][name] = {str(i): x for i, x in enumerate(d) if x != texts[i]}
json.dump(out, sys.stdout, ensure_ascii=True, separators=(",", ":"))
print()
