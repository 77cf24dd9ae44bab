"""Tokenizers from folders and from GGUF metadata."""

import json
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

pytest.importorskip("gguf")
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub import load_tokenizer, resolve
from tests import gguf_files

SCRIPTS = [
    "Hello, world! It's 2026; don't I'LL",
    "Größe, naïve café, Ærøskøbing",
    "Привет, мир. Київ",
    "Γειά σου Κόσμε",
    "你好，世界。汉字漢字",
    "こんにちは カタカナ",
    "한국어 텍스트",
    "مرحبا بالعالم ٣٤٥",
    "שלום עולם",
    "हिन्दी नमस्ते १२३",
    "ภาษาไทย",
    "አማርኛ",
    "ქართული Հայերեն",
    "👩‍👩‍👧 🎉 🏳️‍🌈",
    "a\u0301 e\u0308 combining",
    "  two  spaces\n\n\ttabs \r\n end ",
    "x² ½ ⅷ № ™",
    "\u202eright to left\u202c\u200b\ufeff",
    "",
]


@pytest.fixture(scope="module")
def smollm():
    try:
        return load_tokenizer(resolve("smollm2-135m-instruct"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("text", SCRIPTS)
def test_the_real_tokenizer_round_trips(smollm, text):
    ids = smollm.encode(text)
    assert smollm.decode(ids) == text and all(0 <= i < 49152 for i in ids)
    assert smollm.encode_batch([text, text]) == [ids, ids]


def test_the_real_tokenizer_cuts_every_digit_and_knows_its_special_tokens(smollm):
    assert [smollm.token(i) for i in smollm.encode("abc 1234")][-4:] == ["1", "2", "3", "4"]
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id, smollm.vocab_size) == (1, 2, 2, 49152)
    ids = smollm.encode("<|im_start|>user\nHi<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 5
    assert smollm.decode(ids) == "<|im_start|>user\nHi<|im_end|>"
    assert smollm.decode(ids, skip_special=True) == "user\nHi"


def byte_alphabet():
    """byte -> character, GPT-2's bytes_to_unicode."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_the_real_tokenizer_against_plain_byte_pair_encoding(smollm):
    """An independent, slow implementation on words of letters; ids are positions in the file's own vocabulary."""
    from jaxmodels.hub.gguf_header import GgufFile

    metadata = GgufFile(resolve("smollm2-135m-instruct")).metadata
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    alphabet = byte_alphabet()
    text = "The quick brown fox explains Straßenbahn über Донаудампф naïveté to unbelievable Übermenschen"
    expected = []
    for word in re.findall(r" ?\w+", text):
        parts = [alphabet[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 10**9))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        expected += [vocab[part] for part in parts]
    assert smollm.encode(text) == expected
    missing = [b for b, character in alphabet.items() if character not in vocab]
    # Bytes that UTF-8 never uses, or nobody writes, may be absent: they would vanish from a text.
    assert all(b < 32 or b in range(0xC0, 0xC2) or b >= 0xF1 or b == 0x7F for b in missing), missing


def test_the_real_chat_template(smollm):
    text = smollm.apply_chat([{"role": "user", "content": "Hi {{ 7 * 7 }}"}])
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert "<|im_start|>user\nHi {{ 7 * 7 }}<|im_end|>\n" in text
    assert not smollm.apply_chat([{"role": "user", "content": "Hi"}], prompt=False).endswith("assistant\n")


def test_lone_surrogates_and_ids_outside(smollm):
    assert smollm.decode(smollm.encode("a\udcffb")) == "a\ufffdb"
    assert smollm.decode([smollm.encode("a")[0], 10**6]) == "a"
    with pytest.raises(UserError, match="-1"):
        smollm.decode([-1])


MERGES = ["h e", "he l", "l o", "hel lo", "Ġ w", "o r", "1 2", "2 3"]


def byte_level_file(tmp_path, pre, **more):
    alphabet = list(byte_alphabet().values())
    tokens = ["<s>", "</s>", "<tool>", *alphabet, "he", "hel", "lo", "hello", "Ġw", "or", "12", "23", "xyz"]
    metadata = gguf_files.sizes(L=1) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    metadata |= {f"tokenizer.{key}": value for key, value in more.items()}
    return gguf_files.write(tmp_path / "t.gguf", "qwen2", metadata, {"token_embd.weight": np.ones((4, 4), np.float32)})


@pytest.mark.parametrize(
    "pre, digits, bos",
    [
        ("gpt-2", ["12", "3", "4"], False),
        ("smollm", ["1", "2", "3", "4"], False),
        ("qwen2", ["1", "2", "3", "4"], False),
        ("llama-bpe", ["12", "3", "4"], True),
        ("olmo", ["12", "3", "4"], False),
        ("dbrx", ["12", "3", "4"], False),
    ],
)
def test_pre_tokenizers(tmp_path, pre, digits, bos):
    tokenizer = load_tokenizer(byte_level_file(tmp_path, pre))
    assert [tokenizer.token(i) for i in tokenizer.encode("1234", special=False)] == digits
    assert [tokenizer.token(i) for i in tokenizer.encode("hello wor", special=False)] == ["hello", "Ġw", "or"]
    assert (tokenizer.encode("hello")[0] == 0) is bos
    # A word that no merge reaches is still one token where merges are ignored for whole words.
    assert len(tokenizer.encode("xyz", special=False)) == (1 if pre == "llama-bpe" else 3)
    assert tokenizer.encode("a<tool>b", special=False)[1] == 2
    for text in SCRIPTS:
        expected = text.replace("a\u0301", "\u00e1").replace("e\u0308", "\u00eb") if pre in ("qwen2", "olmo") else text
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == expected
    assert tokenizer.decode(tokenizer.encode("<s>hello</s><tool>", special=False), skip_special=True) == "hello<tool>"


def test_a_file_may_ask_for_a_bos_token(tmp_path):
    tokenizer = load_tokenizer(byte_level_file(tmp_path, "gpt-2", **{"ggml.add_bos_token": True}))
    assert tokenizer.encode("hello") == [0, *tokenizer.encode("hello", special=False)]


def sentencepiece_file(tmp_path, **more):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁hello", "hello", "hel", "lo", "▁h", "ell", *"▁helo"]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0] + [-10.0 - i for i in range(5)]
    # Every piece needs a way to be merged: h+e, then he+l.
    pieces += ["he"]
    scores += [-2.5]
    metadata = gguf_files.sizes(L=1) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= {f"tokenizer.{key}": value for key, value in more.items()}
    return gguf_files.write(tmp_path / "s.gguf", "llama", metadata, {"token_embd.weight": np.ones((4, 4), np.float32)})


def test_sentencepiece_with_byte_fallback(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path))
    pieces = [tokenizer.token(i) for i in tokenizer.encode("hello hello")]
    assert pieces == ["<s>", "▁hello", "▁hello"]
    assert [tokenizer.token(i) for i in tokenizer.encode("é", special=False)] == ["▁", "<0xC3>", "<0xA9>"]
    for text in SCRIPTS:
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.decode(tokenizer.encode("hello"), skip_special=True) == "hello"
    bare = load_tokenizer(sentencepiece_file(tmp_path, **{"ggml.add_space_prefix": False, "ggml.add_bos_token": False}))
    assert [bare.token(i) for i in bare.encode("hello hello")] == ["hello", "▁hello"]
    assert bare.decode(bare.encode(" hello")) == " hello"


def test_a_long_piece_is_refused_before_it_is_cut(tmp_path):
    def built(length):
        change = {"ggml.tokens": ["<unk>", "<s>", "a", "a" * length], "ggml.token_type": [2, 3, 1, 1]}
        more = {"ggml.scores": [0.0, 0.0, -1.0, -2.0], "ggml.eos_token_id": 1}
        return load_tokenizer(sentencepiece_file(tmp_path, **change, **more))

    assert built(512).vocab_size == 4
    with pytest.raises(UserError, match="a token of 5000 characters is over the limit of 512"):
        built(5000)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"ggml.pre": "tekken"}, "'tekken'"),
        ({"ggml.model": "t5"}, "'t5'"),
        ({"ggml.merges": ["h q"]}, "'h q'"),
        ({"ggml.merges": ["h"]}, "'h'"),
        ({"ggml.token_type": [1]}, "1 token types"),
        ({"ggml.bos_token_id": 999999}, "999999"),
        ({"ggml.tokens": "none"}, "no tokenizer"),
        ({"ggml.tokens": [1, 2]}, "ggml.tokens is no list of str"),
        ({"ggml.merges": 3}, "ggml.merges is no list of str"),
        ({"ggml.token_type": 3}, "ggml.token_type is no list of int"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(tmp_path, change, word):
    with pytest.raises(UserError, match=word) as caught:
        load_tokenizer(byte_level_file(tmp_path, "gpt-2", **change))
    assert "\n" not in str(caught.value)


def folder(tmp_path, config=None, **files):
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<e>": 3}, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    inner.enable_truncation(3)
    inner.enable_padding(length=5)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_a_folder(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path, {"eos_token": {"content": "<e>"}, "bos_token": "a", "pad_token": None}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 3, None)
    assert tokenizer.encode("ab ab ab ab a") == [2, 2, 2, 2, 0]  # saved truncation and padding are switched off
    assert tokenizer.decode([2, 0]) == "aba" and tokenizer.vocab_size == 4
    assert load_tokenizer(tmp_path / "tokenizer_config.json").encode("b") == [1]
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "b"}')
    assert load_tokenizer(tmp_path).pad_id == 1


def test_chat_templates_of_a_folder(tmp_path):
    plain = "{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}{{ eos_token }}{% endfor %}"
    message = [{"role": "user", "content": "<ü>"}]
    config = {"eos_token": "<e>", "chat_template": plain}
    assert load_tokenizer(folder(tmp_path, config)).apply_chat(message) == 'user:"<ü>"<e>'
    templates = [{"name": "tool", "template": "x"}, {"name": ["x"]}, "x", {"name": "default", "template": plain}]
    named = config | {"chat_template": templates}
    assert load_tokenizer(folder(tmp_path, named)).apply_chat(message) == 'user:"<ü>"<e>'
    assert load_tokenizer(folder(tmp_path, config, chat_template__jinja="file")).apply_chat(message) == "file"


@pytest.mark.parametrize(
    "template, word",
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "fails"),
        ("{{ messages[0].content.nothing.more }}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails"),
    ],
)
def test_bad_and_hostile_chat_templates(tmp_path, template, word):
    tokenizer = load_tokenizer(folder(tmp_path, {"chat_template": template}))
    with pytest.raises(UserError, match=word):
        tokenizer.apply_chat([{"role": "user", "content": "x"}])


def test_a_chat_template_that_is_no_text(tmp_path):
    (folder(tmp_path) / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(UserError, match="chat_template.jinja is not readable text"):
        load_tokenizer(tmp_path)


def test_a_folder_without_or_with_a_damaged_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="tokenizer_config.json is not readable JSON"):
        load_tokenizer(tmp_path)
