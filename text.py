"""Text: CLIP's byte-pair tokenizer and text encoder, and a small encoder of words that is trained with the denoiser.

Report §4-1 (images from text). Papers: Sennrich et al. 2016 (byte-pair encoding), Radford et al. 2021 (CLIP). A caption
becomes ids, always as many, (L,) of CLIP's pieces or (L, W) of our words' bytes; a transformer makes of them the context (N, L, D)
that a denoiser takes as its y. The unconditional input of classifier-free guidance is the encoded empty caption. State-dict names
are Hugging Face's, vocabularies theirs or OpenAI's. Shapes: N captions, L tokens, D width, h heads.
"""
import gzip
import html
import itertools
import json
import re
import unicodedata
import zlib
from pathlib import Path

import torch
import torch.nn as nn

from files import decoded_text, read_text, readable, unpacked
from vit import attention

START, END = "<|startoftext|>", "<|endoftext|>"
ATOM = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")          # words, whatever follows them
MERGES_FILE, MERGES = "bpe_simple_vocab_16e6.txt.gz", 49152 - 256 - 2        # CLIP's, the first of five times as many there
PREFIX, TABLE = "text_model.", "embeddings.token_embedding.weight"           # of names in state dicts

# A visible character for each byte, in the order of CLIP's ids: visible ones stand for themselves, the others for U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTERS = {byte: chr(byte) for byte in VISIBLE}
CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


# What OpenAI's cleaning, by the library ftfy, makes of single characters: quotes straight, ligatures and full width as letters,
# controls away. Most are Unicode's own compatible characters.
COMPATIBLE = [*range(0x132, 0x134), *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFEF)]
CONTROLS = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
CLEAN = {i: unicodedata.normalize("NFKC", chr(i)) for i in COMPATIBLE} | dict.fromkeys(CONTROLS, "")
CLEAN |= str.maketrans({"\u0149": "'n", "\ufb05": "\u017ft", **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
                        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')})


def normalise(text):
    """What CLIP reads of a caption: characters as in CLEAN, Unicode's NFC, HTML entities resolved, single spaces, lower case.

    ftfy also guesses at texts that were decoded wrongly (as "cafÃ©") and takes codes of terminals out: that is not done here.
    """
    while "<" not in text and (plain := html.unescape(text)) != text:    # what looks like HTML is left to the last line
        text = plain
    text = unicodedata.normalize("NFC", text.translate(CLEAN))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def kind(character):
    """"L" for a letter, "N" for a number, " " for white space, "S" for anything else."""
    return {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], " " if character.isspace() else "S")


def split(text):
    r"""Cut a text into CLIP's words: markers and English endings, runs of letters, single numbers, runs of other characters.

    <\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
    """
    start = 0
    while start < len(text):
        atom, first = ATOM.match(text, start), kind(text[start])
        end = atom.end() if atom else start + 1
        while not atom and first in "LS" and end < len(text) and kind(text[end]) == first:
            end += 1
        if first != " ":
            yield text[start:end]
        start = end


def rest(text, words, room):
    """The rest of a text from the first of its words, pairs (word, number of tokens), that `room` tokens do not hold whole."""
    start = 0
    for word, tokens in words:
        room, start = room - tokens, text.index(word, start)
        if room < 0:
            return text[start:]
        start += len(word)
    return ""


def read_merges(path):
    """The pairs of pieces that merge, first learnt first, after one line of heading.  ValueError or OSError if damaged."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no merges {path}: CLIP's vocabulary is vocab.json and merges.txt, or {MERGES_FILE}")
    try:
        raw = unpacked(path) if path.suffix == ".gz" else readable(path).read_bytes()
        pairs = [tuple(line.split()) for line in decoded_text(raw, path).split("\n")[1:1 + MERGES] if line.strip()]
        if {*map(len, pairs)} != {2}:
            raise ValueError("after its first, a line is a pair")
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not a list of merges: {error}") from None
    return pairs


def read_vocabulary(path, pieces):
    """The id of each piece, from vocab.json.  ValueError or OSError if it is damaged, or not of exactly these pieces."""
    try:
        ids = json.loads(read_text(path))
        fits = ids.keys() == {*pieces} and {*ids.values()} == {*range(len(ids))}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a vocabulary: {error}") from None
    if not fits:
        raise ValueError(f"{path} does not number the {len({*pieces})} pieces that its merges make: the files do not match")
    return ids


class Tokenizer:
    """CLIP's byte-pair tokenizer: a caption -> ids (length,) int64, a start, its pieces, an end, and ends as padding.

    Every word's UTF-8 bytes are merged pairwise, earlier learnt pairs first; "</w>" marks a piece that ends a word. Without
    vocab_file, the ids are counted: bytes, bytes that end a word, merges, start, end. A caption that is too long loses its end.
    ValueError or OSError, in one line, if a file is missing or damaged."""

    def __init__(self, vocab_file=None, merges_file=MERGES_FILE, length=77):
        merges, characters = read_merges(merges_file), [*CHARACTERS.values()]
        pieces = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), START, END]
        self.ids = {piece: i for i, piece in enumerate(pieces)} if vocab_file is None else read_vocabulary(vocab_file, pieces)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.pieces = {i: piece for piece, i in self.ids.items()}
        self.length, self.start, self.end = length, self.ids[START], self.ids[END]
        self.known = {START: [self.start], END: [self.end]}              # the ids of words met before

    def word_ids(self, word):
        """The ids of a word's pieces; lone surrogates, undecodable bytes of a command line, become "?"."""
        if word not in self.known:
            pieces = [CHARACTERS[byte] for byte in word.encode("utf-8", "replace")]
            pieces[-1] += "</w>"
            while len(pieces) > 1:
                rank, i = min((self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(zip(pieces, pieces[1:])))
                if rank == len(self.ranks):                  # none of the pairs merges
                    break
                pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
            self.known[word] = [self.ids[piece] for piece in pieces]
        return self.known[word]

    def __call__(self, text):
        ids = [i for word in split(normalise(text)) for i in self.word_ids(word)][:self.length - 2]
        return torch.tensor([self.start, *ids] + [self.end] * (self.length - 1 - len(ids)))

    def tokenize(self, captions):
        """A list of captions -> ids (N, length) int64."""
        return torch.stack([self(caption) for caption in captions])

    def decode(self, ids):
        """The words of ids up to their end, with one space between them: normalised, so "It's" comes back as "it 's"."""
        pieces = itertools.takewhile(lambda piece: piece != END, (self.pieces[int(i)] for i in ids[1:]))
        text = "".join(pieces).replace("</w>", CHARACTERS[ord(" ")])
        return bytes(BYTES[character] for character in text).decode("utf-8", "replace").removesuffix(" ")

    def cut(self, text):
        """What of a caption the ids do not hold, from the first word that is not in them whole: "" if nothing is lost."""
        text = normalise(text)
        return rest(text, ((word, len(self.word_ids(word))) for word in split(text)), self.length - 2)


class TextBlock(nn.Module):
    """A pre-norm encoder block, as `vit.Block`, with CLIP's names and GELU, and a mask: True where row sees column."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-5)   # epsilon of the released weights
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(dim, dim) for name in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))

    def forward(self, x, mask):
        normal = self.layer_norm1(x)                                                     # (N, L, D)
        q, k, v = (self.self_attn[f"{name}_proj"](normal).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        out = attention(q, k, v, mask=mask)                                              # (N, h, L, d), as q, k, v
        x = x + self.self_attn.out_proj(out.transpose(1, 2).flatten(2))                  # (N, L, D)
        h = self.mlp.fc1(self.layer_norm2(x))                                            # (N, L, hidden)
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))                            # (N, L, D); CLIP's quick GELU


class CLIPTextEncoder(nn.Module):
    """CLIP's transformer of text: ids (N, L) -> (N, L, D), L up to `length`. A token sees itself and those before it.

    The defaults are ViT-L/14's; hidden, the width inside an MLP, is 4 dim."""

    def __init__(self, vocab=49408, length=77, dim=768, depth=12, heads=12, hidden=None):
        super().__init__()
        self.vocab, self.length, self.dim = vocab, length, dim
        tables = dict(token_embedding=nn.Embedding(vocab, dim), position_embedding=nn.Embedding(length, dim))
        layers = nn.ModuleList(TextBlock(dim, heads, hidden or 4 * dim) for _ in range(depth))
        self.text_model = nn.ModuleDict(dict(embeddings=nn.ModuleDict(tables), encoder=nn.ModuleDict(dict(layers=layers)),
                                             final_layer_norm=nn.LayerNorm(dim, eps=1e-5)))
        self.register_load_state_dict_pre_hook(          # older files also hold the numbers 0 .. L-1
            lambda module, state, prefix, *_: state.pop(f"{prefix}{PREFIX}embeddings.position_ids", None))
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)        # Hugging Face's for tables, U-ViT's for products

    def forward(self, ids):
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.length:
            raise ValueError(f"ids of shape {tuple(ids.shape)}: they must be (N, L) with L from 1 to {self.length}")
        tables, L = self.text_model.embeddings, ids.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()                        # causal: no word sees padding
        x = tables.token_embedding(ids) + tables.position_embedding.weight[:L]                     # (N, L, D)
        for layer in self.text_model.encoder.layers:
            x = layer(x, mask)
        return self.text_model.final_layer_norm(x)                                                 # (N, L, D)


class TextEncoder(nn.Module):
    """Ours: a small transformer over the words of a caption, trained with the denoiser.  ids (N, L, W) -> (N, L, D).

    A word is a patch of W = 16 bytes, as an image's are of pixels, flattened and embedded linearly: no vocabulary, few tokens, and
    words that were never seen have an embedding too. Its ids are the bytes, and 256 where it has no more; longer words go on in the
    next token. A token without bytes ends the caption, as do all after it.
    """

    width, none = 16, 256

    def __init__(self, dim=192, length=32, depth=2, heads=4):
        super().__init__()
        self.dim, self.length = dim, length
        self.byte_embedding = nn.Embedding(self.none + 1, 16)            # 16 numbers a byte
        self.word_embedding = nn.Linear(self.width * 16, dim)
        self.position_embedding = nn.Parameter(0.5 * torch.randn(length, dim))       # as large as what it is added to
        self.layers = nn.ModuleList(TextBlock(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    @classmethod
    def pieces(cls, text):
        """The words of a caption, normalised, as (word, its bytes cut into pieces of `width`)."""
        for word in normalise(text).split():
            raw = word.encode("utf-8", "replace")
            yield word, [raw[i:i + cls.width] for i in range(0, len(raw), cls.width)]

    def cut(self, text):
        """What of a caption the ids do not hold, as `Tokenizer.cut`."""
        return rest(normalise(text), ((word, len(pieces)) for word, pieces in self.pieces(text)), self.length - 1)

    def tokenize(self, captions):
        """A list of captions -> ids (N, length, width) int16."""
        ids = torch.full((len(captions), self.length, self.width), self.none, dtype=torch.int16)
        for row, caption in zip(ids, captions):
            pieces = [piece for _, pieces in self.pieces(caption) for piece in pieces][:self.length - 1]
            for place, piece in zip(row, pieces):
                place[:len(piece)] = torch.tensor([*piece], dtype=torch.int16)
        return ids

    def forward(self, ids):
        if ids.ndim != 3 or not 1 <= ids.shape[1] <= self.length or ids.shape[2] != self.width:
            raise ValueError(f"ids of shape {tuple(ids.shape)}: they must be (N, L, {self.width}) with L from 1 to {self.length}")
        empty = (ids == self.none).all(dim=2).long()                                     # (N, L)
        mask = (empty.cumsum(1) - empty == 0)[:, None, None]                             # (N, 1, 1, L): up to the end
        words = self.word_embedding(self.byte_embedding(ids.long()).flatten(2))          # (N, L, W 16) -> (N, L, D)
        x = words + self.position_embedding[:ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)                                                              # (N, L, D)
