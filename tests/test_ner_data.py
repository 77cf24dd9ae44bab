"""Tag schemes, CoNLL files, texts with spans, word vectors, sources, rows: round trips, exact places, bad input."""

import collections
import gzip
import json

import numpy as np
import pytest

from jaxmodels.cnn_cnn_lstm import schemes, tokens
from jaxmodels.cnn_cnn_lstm.network import END, START
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary, pieces
from jaxmodels.errors import UserError
from train.data import conll, spans, tagged
from train.data.conll import Sentence, read_conll, write_conll
from train.data.tagged_rows import tagged_rows
from train.data.word_vectors import read_vectors, write_vectors

IOB2 = ["B-X", "I-X", "I-X", "O", "B-X", "B-X", "I-X", "B-Y", "I-Y", "O", "B-Y"]


# Schemes


def test_round_trips():
    assert schemes.iob1(IOB2) == ["I-X", "I-X", "I-X", "O", "I-X", "B-X", "I-X", "I-Y", "I-Y", "O", "I-Y"]
    assert schemes.iobes(IOB2) == ["B-X", "I-X", "E-X", "O", "S-X", "B-X", "E-X", "B-Y", "E-Y", "O", "S-Y"]
    bilou = [tag.replace("E-", "L-").replace("S-", "U-") for tag in schemes.iobes(IOB2)]
    for tags in (schemes.iob1(IOB2), schemes.iobes(IOB2), bilou, IOB2):
        assert schemes.iob2(tags) == IOB2
    assert schemes.tags_of(schemes.entities(IOB2), len(IOB2)) == IOB2


@pytest.mark.parametrize("tags, repaired", [
    ("I-X I-X O I-X", "B-X I-X O B-X"),  # I- first and after O
    ("B-X I-Y", "B-X B-Y"),  # another type
    ("S-X E-X I-X", "B-X B-X B-X"),  # S- and E- end an entity
    ("B-X E-X E-X", "B-X I-X B-X"),
    ("O E-X I-X", "O B-X B-X"),
    ("B-X O I-X", "B-X O B-X"),
])
def test_illformed_tags(tags, repaired):
    assert schemes.iob2(tags.split()) == repaired.split()


def test_entities_and_their_ends():
    assert schemes.entities(IOB2) == [(0, 3, "X"), (4, 5, "X"), (5, 7, "X"), (7, 9, "Y"), (10, 11, "Y")]
    assert schemes.entities([]) == schemes.entities(["O"]) == []
    with pytest.raises(UserError, match=r"entity \(1, 3, 'X'\) overlaps another or is not within the 3 words"):
        schemes.tags_of([schemes.Entity(0, 2, "X"), schemes.Entity(1, 3, "X")], 3)
    with pytest.raises(UserError, match="tag 'B_X' is of no scheme"):
        schemes.iob2(["B_X"])


@pytest.mark.parametrize("tags, scheme", [
    ("B-X I-X O", "iob2"), ("I-X I-X O I-Y", "iob1"), ("I-X B-X", "iob1"), ("I-X O B-X", "iob2"), ("O S-X", "iobes"),
    ("B-X L-X", "iobes"), ("O O", "iob2"),
])
def test_detection(tags, scheme):
    assert schemes.detect([tags.split()]) == scheme


# CoNLL files


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_two_columns(tmp_path):
    text = "\ufeff#tag\tO\r\n# \tB-X\r\n\r\n \t\r\n\na\u2028b\tI-X\n"
    counts = collections.Counter()
    found = read_conll(write(tmp_path / "a.conll.gz", text), counts=counts)
    assert found == [Sentence(("#tag", "# "), ("O", "B-X")), Sentence(("a\u2028b",), ("B-X",))]
    assert counts == {"crlf": 1, "blank_lines_with_spaces": 1, "repaired": 1}
    again = read_conll(write_conll(tmp_path / "b.conll.gz", found))
    assert again == found
    with pytest.raises(UserError, match="a.conll.gz:6: I-X after the beginning of a sentence is not IOB2; open .* B-X"):
        read_conll(tmp_path / "a.conll.gz", "refuse")


def test_iob1_is_seen_and_nothing_in_it_is_wrong(tmp_path):
    counts = collections.Counter()
    path = write(tmp_path / "a.conll", "a\tI-X\nb\tB-X\nc\tO\n\nd\tI-Y\n")
    assert [one.tags for one in read_conll(path, "refuse", counts)] == [("B-X", "B-X", "O"), ("B-Y",)]
    assert counts == {"iob1": 1}


def test_illformed_iobes_is_counted_and_refused(tmp_path):
    counts = collections.Counter()
    path = write(tmp_path / "a.conll", "a\tU-X\nb\tI-X\nc\tB-X\nd\tL-X\n\ne\tO\nf\tL-Y\n")
    assert [one.tags for one in read_conll(path, "repair", counts)] == [("B-X", "B-X", "B-X", "I-X"), ("O", "B-Y")]
    assert counts == {"iobes": 1, "repaired": 2}
    with pytest.raises(UserError, match="a.conll:2: I-X after U-X is not IOBES; open the entity with B-X"):
        read_conll(path, "refuse")


def test_conll_2003(tmp_path):
    path = write(tmp_path / "a.txt", "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP "
                                     "I-PER\nBlackburn NNP I-NP I-PER\n")
    assert read_conll(path) == [Sentence(("EU", "rejects"), ("B-ORG", "O")),
                                Sentence(("Peter", "Blackburn"), ("B-PER", "I-PER"))]


def ontonotes(*rows):
    lines = [f"bc/cctv/00 0 {i} {word} NN * - - - Speaker#1 {cell} * -" for i, (word, cell) in enumerate(rows)]
    return "#begin document (bc/cctv/00); part 000\n" + "\n".join(lines) + "\n\n#end document\n"


def test_ontonotes(tmp_path):
    path = write(tmp_path / "a.gold_conll", ontonotes(("Hong", "(GPE*"), ("Kong", "*)"), ("on", "*"),
                                                              ("Monday", "(DATE)")))
    assert read_conll(path) == [Sentence(("Hong", "Kong", "on", "Monday"), ("B-GPE", "I-GPE", "O", "B-DATE"))]


@pytest.mark.parametrize("text, told", [
    ("a\tO\nb O\n", r"a.conll:2: 'b O' has no tab; write word, tab, tag"),
    ("a\tO\nb\tNN\tO\n", r"a.conll:2: .* has 3 columns"),
    ("a\tO\n\tO\n", r"a.conll:2: .* has no word"),
    ("a\tO\nb\tX\n", r"a.conll:2: tag 'X' is of no scheme that is known"),
    ("a NN NP O\nb NN O\n", r"a.conll:2: 'b NN O' has 3 columns, the lines before 4"),
    (ontonotes(("a", "(X*"), ("b", "(Y)")), r"a.conll:3: '\(Y\)' in column 11 does not fit"),
    (ontonotes(("a", "(X*")), r"a.conll:3: the sentence ends within a X that word 1 opens"),
    ("#begin document\na b\n", r"a.conll:2: 2 columns, a line of CoNLL-2012 has at least 12"),
])
def test_files_that_are_refused(text, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read_conll(write(tmp_path / "a.conll", text))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.conll").write_bytes(b"a\tO\nb\xff\tO\n")
    with pytest.raises(UserError, match=r"a.conll:2: byte 0xff is not UTF-8"):
        read_conll(tmp_path / "a.conll")
    (tmp_path / "a.conll.gz").write_bytes(gzip.compress(b"a\tO\n" * 99)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_conll(tmp_path / "a.conll.gz")
    with pytest.raises(UserError, match="is empty or holds a tab"):
        write_conll(tmp_path / "b.conll", [Sentence(("a\tb",), ("O",))])


# Words of a text

TEXT = ("Dr. Ed took 0.5 mg α-tocopherol (twice). E. coli grew!  «Oui.» Ça va? "
        "नमस्ते दुनिया। 👩‍👩‍👧 🇩🇪🇫🇷 👍🏽 e\u0301tude, "
        "שלום\u200f עולם. می\u200cخواهم\r\n\t你好。世界！")
ALL = ("'a", "#a", "..", "://", "@a", "a'a", "a-a", "n.n")


@pytest.mark.parametrize("joins", [tokens.PLAIN, (), ALL])
def test_places_are_exact(joins):
    pattern = tokens.pattern_of(joins)
    text = TEXT * 2
    words = [word for sentence in tokens.sentences_of(text, pattern) for word in sentence]
    assert [text[word.start:word.stop] for word in words] == [word.text for word in words]
    assert words == tokens.words_of(text, pattern) and all(a.stop <= b.start for a, b in zip(words, words[1:],
                                                                                             strict=False))
    left = set(text) - set("".join(word.text for word in words))
    assert all(c.isspace() or c == "\u200f" for c in left)


def test_words_and_sentences():
    cut = [[word.text for word in sentence] for sentence in tokens.sentences_of(TEXT, tokens.pattern_of(ALL))]
    assert cut == [["Dr", ".", "Ed", "took", "0.5", "mg", "α-tocopherol", "(", "twice", ")", "."],
                   ["E", ".", "coli", "grew", "!"], ["«", "Oui", ".", "»"], ["Ça", "va", "?"],
                   ["नमस्ते", "दुनिया", "।"], ["👩‍👩‍👧", "🇩🇪", "🇫🇷", "👍🏽", "e\u0301tude", ",", "שלום", "עולם", "."],
                   ["می\u200cخواهم"], ["你好", "。"], ["世界", "！"]]
    assert tokens.sentences_of(" \n ", tokens.pattern_of()) == []
    found = tokens.words_of("@bob it's http://x.org/a-b ... #1", tokens.pattern_of(ALL))
    assert [word.text for word in found] == ["@bob", "it's", "http://x.org/a-b", "...", "#", "1"]


def test_how_a_corpus_cuts_is_read_off_its_words():
    split = [["Parkinson", "'", "s", "0.5", "beta", "-", "blocker", "."]] * 3
    joined = [["Parkinson", "'s", "0", ".", "5", "beta-blocker", "@bob"]] * 3
    assert tokens.joins_of(split) == ("n.n",) and tokens.joins_of(joined) == ("'a", "@a", "a-a")


# Texts with spans


def tags_by_text(sentences):
    return [[(one.text[one.places[e.start][0]:one.places[e.stop - 1][1]], e.type) for e in schemes.entities(one.tags)]
            for one in sentences]


def test_json_lines(tmp_path):
    text = "😀 Aspirin helps.\nא Tay-Sachs e\u0301."
    at = text.index("Tay")
    rows = [{"text": text, "label": [[2, 9, "Drug"], [at, at + 9, "Disease"]]},
            {"text": text, "entities": [{"start": at + 1, "end": at + 9, "label": "Disease"}]},
            {"text": "none"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    counts = collections.Counter()
    assert tags_by_text(spans.read_jsonl(path, counts)) == [
        [("Aspirin", "Drug")], [("Tay-Sachs", "Disease")], [], [("Tay-Sachs", "Disease")], []]
    assert counts == {"widened": 1}


def test_an_entity_holds_its_sentence_together_and_the_longer_one_stays():
    counts = collections.Counter()
    text = "He has St. Anne. Fever too. Yes."
    found = spans.sentences(text, [spans.Span(7, 22, "X"), spans.Span(17, 22, "Y"), spans.Span(15, 16, "Z"),
                                   spans.Span(6, 7, "Q")], "here", counts)
    assert [" ".join(one.words) for one in found] == ["He has St . Anne . Fever too .", "Yes ."]
    assert tags_by_text(found)[0] == [("St. Anne. Fever", "X")]
    assert counts == {"overlapping": 2, "without_words": 1}


def test_entities_of_a_long_text():
    """20,000 in one text: compared with each other they took half a minute, and this file's tests would show it."""
    places, counts = [(5 * i, 5 * i + 4) for i in range(40_000)], collections.Counter()
    entities = [spans.Span(10 * i, 10 * i + 4, "X") for i in range(20_000)] + [spans.Span(0, 9, "X")]
    found = spans.entities_of(entities, places, " " * 200_000, "here", counts)
    assert len(found) == 20_000 and found[0] == (0, 2, "X") and counts == {"overlapping": 1}


def test_brat(tmp_path):
    (tmp_path / "a.txt").write_bytes("Fieber 😀 und\r\nHusten".encode())
    lines = "T1\tS 0 6\tFieber\nR1\tx Arg1:T1\nT2\tS 14 20\tHusten\nT3\tS 0 6;14 20\tFieber Husten\nT4\tW 9 12\tund\n"
    (tmp_path / "a.ann").write_text(lines)
    counts = collections.Counter()
    assert tags_by_text(spans.read_brat(tmp_path, counts)) == [[("Fieber", "S"), ("und", "W")], [("Husten", "S")]]
    assert counts == {"in_pieces": 1}
    (tmp_path / "a.ann").write_text("T1\tS 1 6\tFieber\n")
    with pytest.raises(UserError, match=r"a.ann:1: characters 1..6 of the text are 'ieber', the line says 'Fieber'"):
        spans.read_brat(tmp_path)


@pytest.mark.parametrize("line, told", [
    ("{", "a.jsonl:2: not JSON"), ('{"txt": ""}', "a.jsonl:2: no text"),
    ('{"text": "a", "label": 3}', "a.jsonl:2: label is not a list"),
    ('{"text": "a", "label": [[0, 1]]}', r"a.jsonl:2: label\[0\] is '\[0, 1\]'; write"),
    ('{"text": "a", "label": [[0, 2, "X"]]}', "a.jsonl:2: entity 0..2 is not within the 1 characters"),
    ('{"text": "a", "label": [[0, 1, "X Y"]]}', "type 'X Y' is empty or has spaces"),
])
def test_lines_that_are_refused(line, told, tmp_path):
    with pytest.raises(UserError, match=told):
        spans.read_jsonl(write(tmp_path / "a.jsonl", '{"text": "ok"}\n' + line))


# Sources, vectors, rows


def test_a_folder_of_your_own(tmp_path):
    write(tmp_path / "train.conll", "a\tB-X\n\nb\tO\n")
    write(tmp_path / "devel.json.gz", json.dumps({"text": "c d", "label": [[0, 1, "Y"]]}))
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "1.txt", "e")
    write(tmp_path / "test" / "1.ann", "T1\tX 0 1\te\n")
    found = tagged.tagged_texts(f"path:{tmp_path}")
    assert found.types == ("X",) and found.words == 2
    assert found.counts == {"types_not_in_train": 1, "train_sentences": 2, "train_words": 2, "train_entities": 1,
                            "dev_sentences": 1, "dev_words": 2, "dev_entities": 1, "test_sentences": 1, "test_words": 1,
                            "test_entities": 1}
    write(tmp_path / "valid.conll", "")
    with pytest.raises(UserError, match="both of the dev part"):
        tagged.tagged_texts(f"path:{tmp_path}")


def test_missing_parts_are_cut_from_train(tmp_path):
    path = write(tmp_path / "all.conll", "\n".join(f"w{i}\tB-X\nend\tO\n" for i in range(200)))
    found = tagged.tagged_texts(f"path:{path}")
    sizes = {part: len(one) for part, one in found.parts.items()}
    assert sum(sizes.values()) == 200 and 10 < sizes["dev"] < 32 and 10 < sizes["test"] < 32
    assert not {*found.parts["dev"]} & {*found.parts["train"]} and found.counts["parts_cut_from_train"] == 2
    write(tmp_path / "dev.conll", "a\tO\n")
    (tmp_path / "all.conll").rename(tmp_path / "train.conll")
    again = tagged.tagged_texts(f"path:{tmp_path}")
    assert len(again.parts["dev"]) == 1 and 10 < len(again.parts["test"]) < 32


@pytest.mark.parametrize("name, told", [
    ("bc5cdx", "unknown source of tagged sentences 'bc5cdx'; did you mean 'bc5cdr'"),
    ("path:/nowhere", "/nowhere does not exist"), ("craft:/nowhere", "craft:/nowhere is not here; get it with the"),
])
def test_sources_that_are_not_there(name, told):
    with pytest.raises(UserError, match=told):
        tagged.tagged_texts(name)


def test_empty_parts_and_no_entities(tmp_path):
    write(tmp_path / "train.conll", "a\tO\n")
    for part, text, told in (("dev", "a\tO\n", r"path:.*: the test part has no sentence"),
                             ("test", "a\tO\n", "the training part has no entity")):
        write(tmp_path / f"{part}.conll", text)
        with pytest.raises(UserError, match=told):
            tagged.tagged_texts(f"path:{tmp_path}")


def test_the_shared_corpora(data_folder):
    """The smallest of them against its SOURCE.md."""
    if not (data_folder / "ner_ncbi_disease").exists():
        pytest.skip("ner_ncbi_disease is not in JAXMODELS_DATA")
    found = tagged.tagged_texts("ncbi_disease")
    assert found.types == ("Disease",) and found.counts["types_not_in_train"] == 0 and "CC BY" in found.license
    assert [found.counts[f"{part}_{what}"] for part in tagged.PARTS for what in ("sentences", "words", "entities")] == [
        5424, 135701, 5134, 923, 23969, 787, 940, 24497, 960]
    assert "repaired" not in found.counts and tokens.joins_of(one.words for one in found.parts["dev"]) == ()


def test_vectors(tmp_path):
    path = write_vectors(tmp_path / "v.txt", ["Aspirin", "the", "of"], np.eye(3))
    found = read_vectors(path, {"aspirin"}, limit=1)
    assert set(found) == {"aspirin", "the"} and found["aspirin"].tolist() == [1, 0, 0]
    for text, told in (("a 1 2\nb 1\n", "v.txt:2: 1 numbers, the lines before 2"), ("a 1 x\n", "v.txt:1: not all of"),
                       ("a 1 nan\n", "v.txt:1: a value is not finite"), ("", "has no vector of a word in the data")):
        with pytest.raises(UserError, match=told):
            read_vectors(write(tmp_path / "v.txt", text), {"a", "b"})


def test_vocabulary():
    vocabulary = Vocabulary.build([["Aspirin", "aspirin", "B"]], ["X"], more_words=["zinc"], floor=2, length=8)
    assert vocabulary.words == ("aspirin", "zinc") and vocabulary.tags == ("O", "B-X", "I-X", "E-X", "S-X")
    assert vocabulary.word_ids(["ASPIRIN", "b", "zinc"]) == [4, 1, 5]
    letters = [vocabulary.chars.index(c) + 4 for c in "Aspin"]
    assert vocabulary.char_ids("Aspirin€").tolist() == [START, *letters, 1, END]  # without its middle; € is unknown
    assert vocabulary.char_ids("Asp").tolist() == [START, *letters[:3], END, 0, 0, 0]
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary
    with pytest.raises(UserError, match="tag S-Y is not one of this tagger's; its types are X"):
        vocabulary.encode_tags(["S-Y"])
    with pytest.raises(UserError, match="the vocabulary is damaged"):
        Vocabulary.from_json({"words": ["a"]})
    for length, told in ((10**9, "1000000000 characters of a word are over the limit"), (1e400, "is damaged")):
        with pytest.raises(UserError, match=told):
            Vocabulary.from_json(vocabulary.to_json() | {"length": length})
    assert pieces(300, 126) == [(0, 100), (100, 200), (200, 300)] and pieces(3, 126) == [(0, 3)]


def test_rows_hold_every_word_once_and_keep_sentences_apart():
    r = np.random.default_rng(0)
    sentences = [Sentence(tuple(f"w{r.integers(50)}" for _ in range(n)), tuple(IOB2[:n] if n < 12 else ["O"] * n))
                 for n in [*r.integers(1, 11, 40), 75]]
    vocabulary = Vocabulary.build([one.words for one in sentences], ["X", "Y"], length=6)
    gap = 2
    rows = tagged_rows(sentences, vocabulary, 32, gap)
    assert rows["words"].shape[1:] == (32,) and rows["chars"].shape[1:] == (32, 6)
    found = []
    for words, tags, chars in zip(rows["words"], rows["tags"], rows["chars"], strict=True):
        starts, ends = np.flatnonzero(words == START), np.flatnonzero(words == END)
        assert len(starts) == len(ends) and (starts[1:] - ends[:-1] > gap).all()
        assert not chars[words == 0].any() and not tags[words == 0].any()
        for a, b in zip(starts, ends, strict=True):
            found.append((words[a + 1:b].tolist(), tags[a + 1:b].tolist()))
            assert all(c.tolist() == vocabulary.char_ids(vocabulary.words[w - 4]).tolist()
                       for w, c in zip(words[a + 1:b], chars[a + 1:b], strict=True))
    expected = []
    for one in sentences:
        ids, gold = vocabulary.word_ids(one.words), vocabulary.encode_tags(schemes.iobes(one.tags))
        expected += [(ids[a:b], gold[a:b]) for a, b in pieces(len(ids), 30)]
    assert sorted(found) == sorted(expected)
    again = tagged_rows(sentences, vocabulary, 32, gap, seed=1)
    assert not np.array_equal(again["words"], rows["words"]) and (again["words"] > 0).sum() == (rows["words"] > 0).sum()


def test_a_read_sentence_is_iob2_whatever_it_was(tmp_path):
    path = write(tmp_path / "a.conll", "".join(f"w\t{tag}\n" for tag in schemes.iobes(IOB2)))
    assert conll.read_conll(path)[0].tags == tuple(IOB2)
