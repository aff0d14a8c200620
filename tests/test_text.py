"""CLIP's tokenizer and text encoder: OpenAI's and Hugging Face's numbers; properties of both, and of our encoder of bytes.

Where a claim is an identity it is checked in float64, to EXACT: rounding is 1e-16 for each of some hundred terms of size 1.
"""
import functools
import gzip
import json
import re
import shutil
import sys
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings, strategies as st
from torch.testing import assert_close

from checkpoint import load_clip
from formula import GOLDEN, fill, golden, golden_json
from text import CLIPTextEncoder, TextEncoder, Tokenizer, normalise, split

EXACT = {"rtol": 1e-11, "atol": 1e-11}
TINY = GOLDEN / "clip_tiny"
VOCABULARIES = {"vocab.json": TINY / "vocab.json", "counted": None}

# Text of any characters, and of those on which the definitions of letter, number and space could part, or words begin
PARTS = ["'s", "'ve", "'", "the dog", "<|startoftext|>", "<|", "</w>", "½²", "Ⅷ", "٣", "一", "ﬁ", "ʰ", "e\u0301", "_",
         "&amp;amp;", "\u200b", "\u00a0", "\u3000", "\n", "  ", "\x1c", "🐱", "\0", "İ", "ß"]
texts = st.lists(st.text(max_size=8) | st.sampled_from(PARTS), max_size=12).map("".join)
captions = st.lists(st.sampled_from("a cat photo of the dogs riding it's walk on ing, th thing in".split()),
                    max_size=40).map(" ".join)
few = settings(max_examples=10)              # for whole networks


@functools.cache
def tiny(vocabulary="vocab.json", length=77):
    return Tokenizer(VOCABULARIES[vocabulary], TINY / "merges.txt", length)


@functools.cache
def character_class(*initials):
    """A regular expression's class of the characters whose Unicode category begins so, as ranges."""
    points = [i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] in initials]
    starts, ends = {*points} - {i + 1 for i in points}, {*points} - {i - 1 for i in points}
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(sorted(starts), sorted(ends)))


@functools.cache
def pattern():
    """CLIP's own regular expression, with Unicode's categories written out."""
    L, N = character_class("L"), character_class("N")
    return re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[{L}]+|[{N}]|[^\s{L}{N}]+")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padded(ids, tokenizer):
    return ids + [tokenizer.end] * (tokenizer.length - len(ids))


# Words and their pieces

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A tokenizer of CLIP's size: OpenAI's lines where they matter to the golden captions, elsewhere pairs that never occur."""
    path, lines = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt.gz", golden_json("clip_merges")["lines"]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        file.write("\n".join(["a heading", *(lines.get(str(i), f"#{i} #") for i in range(1, 50000)), ""]))
    return Tokenizer(merges_file=path)


def test_ids_equal_openais_on_the_vocabulary_of_clip(clips):
    expected = golden_json("clip_tokenizer")
    assert (len(clips.ids), clips.length) == (expected["vocab_size"], expected["context_length"])
    for row in expected["rows"]:
        assert clips(row["text"]).tolist() == padded(row["ids"], clips), row["text"]
    assert (clips.start, clips.end) == (expected["sot"], expected["eot"])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_equal_openais_on_a_small_vocabulary(vocabulary):
    expected, tokenizer = golden_json("clip_tiny/expected"), tiny(vocabulary)
    assert (tokenizer.start, tokenizer.end, tokenizer.end) == (expected["sot"], expected["eot"], expected["pad"])
    for row in expected["rows"]:
        ids = tokenizer(row["text"])
        assert ids.dtype == torch.int64 and ids.tolist() == padded(row["ids"], tokenizer), row["text"]


def test_a_vocabulary_counted_from_the_merges_is_hugging_faces_file():
    assert tiny("counted").ids == golden_json("clip_tiny/vocab")


def test_the_vocabulary_file_decides_the_ids(tmp_path):
    ids = golden_json("clip_tiny/vocab")
    (tmp_path / "vocab.json").write_text(json.dumps({piece: len(ids) - 1 - i for piece, i in ids.items()}))
    backward = Tokenizer(tmp_path / "vocab.json", TINY / "merges.txt")
    assert_close(backward("a photo of a cat"), len(ids) - 1 - tiny()("a photo of a cat"))
    assert backward.decode(backward("a photo")) == "a photo"


@settings(max_examples=300)
@given(texts)
@example("!<|startoftext|>'s's 12½x_y dog's 'tis")
def test_words_are_those_of_clips_regular_expression(text):
    assert list(split(text)) == pattern().findall(text)


@settings(max_examples=100)
@given(texts)
def test_decoding_ids_gives_the_normalised_words(text):
    assume("<|endoftext|>" not in text)
    tokenizer = tiny(length=1000)
    clean = normalise(text)
    # the other marker is no end, but one piece without "</w>"
    assert tokenizer.decode(tokenizer(text)).replace(" ", "") == "".join(pattern().findall(clean)).replace(" ", "")
    if "<|startoftext|>" not in clean:
        assert tokenizer.decode(tokenizer(text)) == " ".join(pattern().findall(clean))


@given(captions)
def test_pieces_are_what_applying_the_merges_one_after_the_other_leaves(caption):
    tokenizer = tiny()
    for word in caption.split():
        if pattern().fullmatch(word):
            pieces = [*word[:-1], word[-1] + "</w>"]
            for line in (TINY / "merges.txt").read_text().splitlines()[1:]:
                for i in reversed(range(len(pieces) - 1)):
                    if pieces[i:i + 2] == line.split():
                        pieces[i:i + 2] = ["".join(line.split())]
            assert [tokenizer.pieces[i] for i in tokenizer.word_ids(word)] == pieces


@pytest.mark.parametrize("text", ["A Café &amp; bar", "a cafe\u0301 & bar", "  a\tcafé\n&\u3000bar ", "a café &amp;amp; bar",
                                  "A CAFÉ & BAR"])
def test_captions_that_differ_in_spacing_case_composition_or_html_are_alike(text):
    assert torch.equal(tiny()(text), tiny()("a café & bar"))


def test_a_lone_surrogate_reads_as_a_question_mark():
    assert torch.equal(tiny()("a \udcff cat"), tiny()("a ? cat"))
    assert TextEncoder().tokenize(["a \udcff cat"]).tolist() == TextEncoder().tokenize(["a ? cat"]).tolist()


@pytest.mark.parametrize("marker, i", [("<|startoftext|>", 712), ("<|EndOfText|>", 713)])
def test_a_marker_in_a_caption_is_its_own_id(marker, i):
    assert tiny()(f"a {marker}cat")[1:4].tolist() == [*tiny()("a")[1:2], i, *tiny()("cat")[1:2]]


@given(captions, st.integers(2, 30))
def test_truncation_keeps_the_beginning_and_the_end_token(caption, length):
    short, long = tiny(length=length)(caption), tiny(length=1000)(caption)
    assert short.shape == (length,) and short[-1] == tiny().end
    assert torch.equal(short[:-1], long[:length - 1])


@given(texts | captions, st.integers(2, 30))
def test_what_is_cut_begins_with_the_first_word_that_is_not_held_whole(text, length):
    tokenizer, whole = tiny(length=length), normalise(text)
    cut = tokenizer.cut(text)
    words, lost = list(split(whole)), list(split(cut))
    kept = words[:len(words) - len(lost)]
    assert whole.endswith(cut) and words[len(kept):] == lost
    used = [sum(len(tokenizer.word_ids(word)) for word in taken) for taken in (kept, kept + lost[:1])]
    assert used[0] <= length - 2 and (not lost or used[1] > length - 2)


def damaged(folder, merges=None, vocab=None):
    """A tokenizer of the small vocabulary's files, where given with other content (bytes)."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    name = "merges.txt.gz" if merges and merges[:2] == b"\x1f\x8b" else "merges.txt"
    for file, content in ((name, merges), ("vocab.json", vocab)):
        if content is not None:
            (folder / file).write_bytes(content)
    return Tokenizer(None if vocab is None else folder / "vocab.json", folder / name)


PACKED = gzip.compress((TINY / "merges.txt").read_bytes())
IDS = json.loads((TINY / "vocab.json").read_text())


@pytest.mark.parametrize("content", [b"", b"heading\n", b"heading\na b\nc\n", b"heading\na b c\n",
                                     b"heading\n\xff\xfe \x80\n", PACKED[:200],
                                     PACKED[:50] + b"\xff" * 50 + PACKED[100:], b"\x1f\x8bnothing"])
def test_damaged_merges_are_refused_in_one_line(tmp_path, content):
    with pytest.raises(ValueError, match=r"merges\.txt(\.gz)? is not a list of merges: [^\n]+$"):
        damaged(tmp_path, content)


def changed_ids(**changes):
    return json.dumps({**IDS, **changes}).encode()


@pytest.mark.parametrize("content, message", [
    (b"", "is not a vocabulary"), (b"[1, 2]", "is not a vocabulary"), (b"\xff", "is not a vocabulary"),
    (b"[" * 10 ** 5, "is not a vocabulary"), (changed_ids()[:-1], "is not a vocabulary"),
    (changed_ids(a=[1]), "is not a vocabulary"), (changed_ids(a=0), "does not number the 714 pieces"),
    (changed_ids(a=714), "does not number"), (changed_ids(new=714), "does not number"),
    (json.dumps(dict([*IDS.items()][:-3])).encode(), "does not number")])
def test_a_damaged_vocabulary_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*vocab\.json {message}[^\n]*$"):
        damaged(tmp_path, vocab=content)


def test_merges_cut_off_are_noticed_by_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="the files do not match"):
        damaged(tmp_path, b"\n".join((TINY / "merges.txt").read_bytes().splitlines()[:100]), json.dumps(IDS).encode())


@pytest.mark.parametrize("files", [("vocab.json", "no.txt"), (None, "no.txt"), ("no.json", "merges.txt")])
def test_a_missing_file_is_named(files):
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*no\.(txt|json)[^\n]*$"):
        Tokenizer(files[0] and TINY / files[0], TINY / files[1])


# CLIP's encoder

def clip(**changes):
    """A tiny encoder with formula weights, in float64."""
    return fill(CLIPTextEncoder(**dict(vocab=50, length=12, dim=16, depth=2, heads=2) | changes)).double()


def test_hidden_states_equal_hugging_faces():
    network = CLIPTextEncoder(vocab=100, length=16, dim=32, depth=2, heads=4, hidden=64)
    data, meta = golden("clip_text_small", network)
    hidden, expected = network(data["in_ids"]), data["out_last_hidden_state"]
    assert_close(hidden, expected, rtol=0, atol=1e-4 * expected.std().item())            # meta["tolerance"]
    ends = (data["in_ids"] == meta["config"]["eos_token_id"]).int().argmax(dim=1)        # the first
    assert_close(hidden[range(3), ends], data["out_pooled"], rtol=0, atol=1e-4 * data["out_pooled"].std().item())


def test_names_shapes_and_count_are_those_of_vit_l_14():
    with torch.device("meta"):
        network = CLIPTextEncoder()
    expected = golden_json("clip_vitl14_text_keys")
    assert {name: [*value.shape] for name, value in network.state_dict().items()} == dict(expected["keys"])
    assert sum(value.numel() for value in network.parameters()) == expected["params"]
    assert {layer.heads for layer in network.text_model.encoder.layers} == {expected["config"]["num_attention_heads"]}


def test_position_ids_of_older_files_are_ignored_and_no_other_stranger():
    network, older = clip(), clip().state_dict()
    older["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    network.load_state_dict(older, strict=True)
    assert "text_model.embeddings.position_ids" in older                 # the caller's dict is left alone
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict({**older, "text_model.position_ids": torch.zeros(1)}, strict=True)


@few
@given(st.integers(1, 12), st.data())
def test_a_later_token_changes_no_earlier_output(length, data):
    network, ids, at = clip(), torch.arange(2 * length).reshape(2, length), data.draw(st.integers(0, length - 1))
    changed = ids.clone()
    changed[:, at] += 20
    differs = (network(ids) - network(changed)).abs().amax(dim=2) > 1e-9
    assert differs.tolist() == [[i >= at for i in range(length)]] * 2


@few
@given(st.integers(1, 12))
def test_a_shorter_text_is_encoded_as_the_beginning_of_the_longer(length):
    ids = torch.arange(24).reshape(2, 12)
    assert_close(clip()(ids[:, :length]), clip()(ids)[:, :length], **EXACT)


def captions_of(network):
    """Ids of three captions of unequal lengths."""
    if isinstance(network, TextEncoder):
        return network.tokenize(["a red star", "", "so many words that they are as many as it can hold"])
    return torch.tensor([[5, 6, 7] * 4, [1, *[6] * 11], [9] * 12])


@pytest.mark.parametrize("build", [clip, lambda: fill(TextEncoder(dim=16, length=12)).double()])
def test_a_captions_encoding_ignores_the_other_captions(build):
    ids = captions_of(build())
    assert_close(build()(ids)[1:2], build()(ids[1:2]), **EXACT)


@pytest.mark.parametrize("build", [lambda: CLIPTextEncoder(vocab=50, length=12, dim=16, depth=2, heads=2),
                                   lambda: TextEncoder(dim=16, length=12, depth=2, heads=2)])
def test_every_parameter_of_a_fresh_encoder_gets_a_gradient(build):
    torch.manual_seed(0)
    network = build()
    (network(captions_of(network)) * normal(3, 12, 16)).sum().backward()
    # but for the bias of the keys, which adds the same to all scores of a softmax: rounding leaves 1e-9 of it
    assert [name for name, value in network.named_parameters()
            if "k_proj.bias" not in name and not value.grad.abs().max() > 1e-7] == []


@pytest.mark.parametrize("shape", [(12,), (2, 13), (2, 0), (2, 3, 4)])
def test_ids_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match=r"they must be \(N, L\) with L from 1 to 12"):
        clip()(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"they must be \(N, L, 16\) with L from 1 to 12"):
        ours()(torch.zeros(*shape, 15, dtype=torch.long))


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="5 heads do not divide width 16"):
        TextEncoder(dim=16, heads=5)


# CLIP's files

def clip_of_tiny():
    """An encoder for the small vocabulary whose two heads are 64 wide."""
    return fill(CLIPTextEncoder(vocab=714, length=20, dim=128, depth=2, heads=2, hidden=96))


def folder(path, tensors, name="pytorch_model.bin"):
    """A folder of the small vocabulary and these weights."""
    shutil.copytree(TINY, path, dirs_exist_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, path / name)
        return path
    header, content = {}, b""
    for key, value in tensors.items():
        raw = value.numpy().tobytes()
        header[key] = dict(dtype={2: "F16", 4: "F32", 8: "I64"}[value.element_size()], shape=[*value.shape],
                           data_offsets=[len(content), len(content) + len(raw)])
        content += raw
    header = json.dumps(header).encode()
    (path / name).write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_the_text_encoder_is_taken_out_of_all_of_clip(tmp_path, name):
    vision = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(7, 5), "text_projection.weight": torch.zeros(9, 128),
              "logit_scale": torch.zeros(()), "text_model.embeddings.position_ids": torch.arange(20)[None]}
    network, tokenizer = load_clip(folder(tmp_path, {**vision, **clip_of_tiny().state_dict()}, name))
    assert not network.training and tokenizer.length == 20
    ids = tokenizer("a photo of a cat")[None]
    assert torch.equal(network(ids), clip_of_tiny()(ids))


def test_the_weights_may_be_named_themselves_or_lie_in_stable_diffusion(tmp_path):
    within = {"cond_stage_model.transformer." + key: value for key, value in clip_of_tiny().state_dict().items()}
    path = folder(tmp_path, {"model.diffusion_model.out.weight": torch.zeros(3), **within})
    network, _ = load_clip(path / "pytorch_model.bin")
    assert_close(network.state_dict(), clip_of_tiny().state_dict())


def test_half_precision_is_read_as_single(tmp_path):
    network, _ = load_clip(folder(tmp_path, clip_of_tiny().half().state_dict(), "model.safetensors"))
    assert_close(network.state_dict(), clip_of_tiny().half().float().state_dict())


def test_the_vocabulary_may_be_openais_file_alone(tmp_path):
    path = folder(tmp_path, clip_of_tiny().state_dict())
    (path / "vocab.json").unlink()
    (path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(PACKED)
    assert load_clip(path)[1].ids == tiny().ids


def lacking(name):
    return lambda state: {key: value for key, value in state.items() if name not in key}


def other(name, *shape):
    return lambda state: {**state, f"text_model.{name}": torch.zeros(shape)}


@pytest.mark.parametrize("change, message", [
    (lacking("token_embedding"), "it lacks 'text_model.embeddings.token_embedding.weight'"),
    (lacking("layers"), "it lacks 'text_model.encoder.layers.0.mlp.fc1.weight'"),
    (lacking("layers.1.mlp.fc2.bias"), "fc2.bias is missing"), (other("more", 1), "more is .* should be absent"),
    (other("final_layer_norm.bias", 7), "bias is .7,. and should be .128,."), (other("embeddings.token_embedding.weight", 714), "no text encoder"),
    (other("embeddings.token_embedding.weight", 700, 128), "714 pieces where its encoder has 700"),
    (lambda state: {}, "it lacks"), (lambda state: [*state.values()], "no text encoder"),
    (lambda state: {1: torch.zeros(1)}, "no text encoder"), (lambda state: 5, "no text encoder")])
def test_weights_of_anything_else_are_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_clip(folder(tmp_path, change(clip_of_tiny().state_dict())))


def test_weights_that_are_not_there_are_not_replaced_by_their_neighbours(tmp_path):
    with pytest.raises(FileNotFoundError, match="other.bin"):
        load_clip(folder(tmp_path, clip_of_tiny().state_dict()) / "other.bin")


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu"}, {"text_config": {"hidden_act": "gelu"}}])
def test_a_clip_of_another_gelu_is_refused(tmp_path, settings):
    path = folder(tmp_path, clip_of_tiny().state_dict())
    (path / "config.json").write_text(json.dumps({"hidden_act": "quick_gelu"}, indent=2))
    load_clip(path)
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    with pytest.raises(ValueError, match="exact GELU"):
        load_clip(path)


# Our encoder

def ours(**changes):
    """A tiny encoder with formula weights, in float64."""
    return fill(TextEncoder(**dict(dim=16, length=12, depth=2, heads=2) | changes)).double()


def words_of(ids):
    """The bytes in each token of a caption's ids (L, W), without the empty ones."""
    return [bytes(row[row != 256].tolist()) for row in ids if (row != 256).any()]


@settings(max_examples=100)
@given(texts, st.integers(1, 20))
@example("日本語の長い長い言葉", 4)
def test_ids_are_the_words_bytes_in_order_as_far_as_they_fit_before_an_end(text, length):
    network = TextEncoder(dim=4, length=length, depth=0, heads=1)
    (ids,) = network.tokenize([text])
    kept, whole = words_of(ids), normalise(text)
    assert ids.shape == (length, 16) and len(kept) < length and (ids[len(kept):] == 256).all()
    everything = b"".join(whole.encode("utf-8", "replace").split())
    assert everything.startswith(b"".join(kept))
    lost = network.cut(text)
    assert whole.endswith(lost) and (lost == "") == (b"".join(kept) == everything)
    if lost:
        assert len(kept) == length - 1


def test_a_token_is_a_word_or_sixteen_bytes_of_it():
    ids = ours().tokenize(["A  red\nsupercalifragilisticexpialidocious é"])[0]
    assert words_of(ids) == [b"a", b"red", b"supercalifragili", b"sticexpialidocio", b"us", "é".encode()]


def test_a_list_of_captions_becomes_a_row_each():
    assert ours().tokenize(["a", "", "b c"]).shape == (3, 12, 16)
    assert ours().tokenize([]).shape == (0, 12, 16) and ours().tokenize([]).dtype == ours().tokenize([""]).dtype == torch.int16


@few
@given(st.integers(0, 11), st.integers(1, 12))
def test_padding_can_be_left_away(words, length):
    ids = ours().tokenize(["word " * words])
    length = max(length, words + 1)
    assert_close(ours()(ids[:, :length]), ours()(ids)[:, :length], **EXACT)


@few
@given(st.integers(0, 10), st.integers(0, 2 ** 32))
def test_what_is_after_the_end_changes_nothing_before_it(words, seed):
    ids = ours().tokenize(["word " * words])
    changed = ids.clone()
    changed[:, words + 1:] = torch.randint(257, (1, 11 - words, 16), generator=torch.Generator().manual_seed(seed))
    assert_close(ours()(changed)[:, :words + 1], ours()(ids)[:, :words + 1], **EXACT)


@few
@given(st.integers(0, 2), st.integers(0, 15))
def test_every_token_sees_every_byte_of_the_caption(word, at):
    ids = ours().tokenize(["a red cat"])
    changed = ids.clone()
    changed[:, word, at] -= 1                            # where there was no byte, there is one now
    assert ((ours()(ids) - ours()(changed)).abs().amax(dim=2) > 1e-9).all()


def test_the_order_of_words_matters_through_the_positions_alone():
    network = ours()
    one, other = network(network.tokenize(["cat and dog", "and cat dog"]))
    assert not torch.allclose(one[3:], other[3:], atol=1e-3)
    network.position_embedding.data.zero_()
    one, other = network(network.tokenize(["cat and dog", "and cat dog"]))
    assert_close(one[[1, 0, *range(2, 12)]], other, **EXACT)


def test_the_order_of_bytes_in_a_word_matters():
    network = ours()
    network.position_embedding.data.zero_()
    cat, act = network(network.tokenize(["cat", "act"]))
    assert (cat - act).abs().max() > 0.1


def test_the_empty_caption_is_an_input_of_its_own():
    encoded = ours()(ours().tokenize(["", " \n", "a"]))
    assert encoded.isfinite().all() and torch.equal(encoded[0], encoded[1]) and (encoded[0, 0] - encoded[2, 0]).norm() > 0.1


def test_words_see_the_end_of_their_caption_and_nothing_after_it():
    network = ours()
    ids = network.tokenize(["a"])
    before = network(ids)[0, 0]
    for place, seen in ((1, True), (2, False)):
        network.position_embedding.data[place] += normal(16)
        assert ((network(ids)[0, 0] - before).abs().max() > 1e-3) == seen
        before = network(ids)[0, 0]


def test_training_steps_tell_apart_captions_of_the_same_words():
    torch.manual_seed(0)
    network, readout = TextEncoder(dim=32, length=16, depth=1, heads=2), torch.nn.Linear(32, 2)
    optimizer = torch.optim.AdamW([*network.parameters(), *readout.parameters()], lr=3e-3)
    ids, losses = network.tokenize(["red on blue", "blue on red"]), []
    for _ in range(60):
        losses.append(F.cross_entropy(readout(network(ids).mean(dim=1)), torch.tensor([0, 1])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.5 and losses[-1] < 0.05
