"""The pre-check of OpenVINO folders: the XML of each graph, and its constants against the file of weights."""

from __future__ import annotations

import math
import re
import xml.parsers.expat
from pathlib import Path

from edgewright.errors import Unsafe
from edgewright.export.guard.config import check_configs
from edgewright.export.guard.files import Broken, naming, open_regular, printable
from edgewright.export.guard.folder import check_entries
from edgewright.export.guard.paths import is_shared
from edgewright.export.guard.values import FloatSpan, check_finite

MAX_XML_BYTES = 64 * 2**20
MAX_ELEMENTS = 400_000
MAX_DEPTH = 64
"""Elements inside each other; the bodies of If and Loop take four each."""
MAX_CONSTANTS = 50_000
MAX_TOKEN_BYTES = 2 * 2**20
"""Longest single attribute or text, such as a chat template."""

BITS = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4, "u64": 64,
    "u32": 32, "u16": 16, "u8": 8, "u4": 4, "u2": 2, "u1": 1, "nf4": 4, "boolean": 8, "f8e4m3": 8, "f8e5m2": 8,
    "f8e8m0": 8, "f4e2m1": 4, "i2": 2,
}  # fmt: skip
"""Width of each element type in bits."""
UNSIZED = frozenset({"string", "u3", "u6"})
"""Types whose bytes do not follow from the shape alone: only that they end inside the file is checked."""
_FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64"}
_OPERATIONS = re.compile(r"opset\d{1,2}")
TOKENIZER_OPERATIONS = frozenset({
    "BPETokenizer", "BytesToChars", "ByteFallback", "CaseFold", "CharsMapNormalization", "CharsToBytes",
    "CombineSegments", "EqualStr", "FuzeRagged", "NormalizeUnicode", "RaggedTensorPack", "RaggedToDense",
    "RaggedToRagged", "RaggedToSparse", "RegexNormalization", "RegexSplit", "SentencepieceDetokenizer",
    "SentencepieceStreamDetokenizer", "SentencepieceTokenizer", "SpecialTokensSplit", "StringSplit",
    "StringTensorPack", "StringTensorUnpack", "StringToHashBucketFast", "TrieTokenizer", "Truncate",
    "UnigramTokenizer", "UTF8Validate", "VocabDecoder", "VocabEncoder", "WordpieceTokenizer",
    "WordLevelTokenizer",
})  # fmt: skip
"""What the package openvino_tokenizers adds under the version `extension`."""


def check_openvino_folder(directory: Path) -> None:
    """Refuse an OpenVINO folder that is unsafe or damaged.

    Checked: the entries of the folder, every `*.xml` with its `*.bin`, and the JSON files.

    Raises:
        Unsafe: EW-335, operations of a foreign extension, or an XML with entities; EW-331, a hard link to elsewhere.
        BadInput: EW-334, a graph is damaged; EW-311, its weights are missing; EW-323, they hold NaN.
    """
    directory = Path(directory)
    for path in check_entries(directory, deep=True):
        if path.suffix.lower() == ".xml":
            check_openvino(path)
    check_configs(directory)


def check_openvino(path: Path) -> None:
    """Refuse an OpenVINO graph, `NAME.xml` with `NAME.bin`, that is unsafe or damaged; errors as above."""
    size = open_regular(path)
    with naming("EW-334", "OpenVINO graph", path):
        if not 0 < size <= MAX_XML_BYTES:
            raise Broken("its size", f"1 to {MAX_XML_BYTES} bytes", size)
        graph = _Graph(path)
        graph.read()
    check_finite(graph.spans)


class _Graph:
    """Handlers of one pass over the XML; nothing but the constants is kept."""

    def __init__(self, path: Path) -> None:
        self.spans: list[FloatSpan] = []
        self._path, self._weights = path, path.with_suffix(".bin")
        self._available: int | None = None
        self._depth = self._elements = self._layers = self._constants = 0
        self._layer = ""
        self._parser = xml.parsers.expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.EntityDeclHandler = self._doctype

    def read(self) -> None:
        """Parse the file in pieces.

        Raises:
            Broken: it is no such graph. Unsafe: EW-331, EW-335.
        """
        try:
            with self._path.open("rb") as file:
                while piece := file.read(2**16):
                    self._parser.Parse(piece, False)
                    if file.tell() - max(self._parser.CurrentByteIndex, 0) > MAX_TOKEN_BYTES:
                        raise Broken(f"the element at {self._place()}", f"at most {MAX_TOKEN_BYTES} bytes", "more")
                self._parser.Parse(b"", True)
        except xml.parsers.expat.ExpatError as error:
            raise Broken(f"line {error.lineno}, column {error.offset}", "XML", str(error)) from None
        if not self._layers:
            raise Broken("its content", "a net with layers", "none")

    def _place(self) -> str:
        return f"line {self._parser.CurrentLineNumber}, column {self._parser.CurrentColumnNumber}"

    def _doctype(self, *unused: object) -> None:
        raise self._unsafe("declares entities, which could read files or fill the memory", "a plain <net>", "DOCTYPE")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            limits = f"at most {MAX_ELEMENTS} elements, {MAX_DEPTH} inside each other"
            raise Broken(f"the element at {self._place()}", limits, "more")
        if self._depth == 1 and name != "net":
            raise Broken("its content", "<net>", printable(f"<{name}>"))
        if name == "layer":
            self._layers += 1
            self._operation(attributes)
        elif name == "data" and self._layer == "Const":
            self._constant(attributes)

    def _end(self, name: str) -> None:
        self._depth -= 1

    def _operation(self, attributes: dict[str, str]) -> None:
        kind, version = attributes.get("type", ""), attributes.get("version", "")
        self._layer = kind
        known = _OPERATIONS.fullmatch(version) or (version == "extension" and kind in TOKENIZER_OPERATIONS)
        if not known:
            what = "needs an operation that OpenVINO does not have: a library would have to run"
            found = f"{printable(kind)} of {printable(version)} at {self._place()}"
            raise self._unsafe(what, "operations of opset1 and later, and those of openvino_tokenizers", found)

    def _constant(self, attributes: dict[str, str]) -> None:
        self._constants += 1
        if self._constants > MAX_CONSTANTS:
            raise Broken("the number of its constants", f"at most {MAX_CONSTANTS}", f"more at {self._place()}")
        what = f"the constant at {self._place()}"
        kind, shape = attributes.get("element_type", ""), attributes.get("shape", "")
        sizes = [_number(part.strip(), f"the shape of {what}") for part in shape.split(",") if part.strip()]
        begin = _number(attributes.get("offset", ""), f"the offset of {what}")
        size = _number(attributes.get("size", ""), f"the size of {what}")
        if kind not in BITS and kind not in UNSIZED:
            raise Broken(f"the type of {what}", "a type that OpenVINO knows", printable(kind))
        if len(sizes) > 32 or math.prod(sizes) >= 2**48:
            raise Broken(f"the shape of {what}", "at most 2^48 elements", printable(shape))
        if kind in BITS and size != max(1, -(-math.prod(sizes) * BITS[kind] // 8)):  # nothing is written as one byte
            raise Broken(f"the size of {what}", f"{-(-math.prod(sizes) * BITS[kind] // 8)} bytes", size)
        if begin + size > self._size():
            raise Broken(f"the end of {what}", f"at most byte {self._size()} of {self._weights.name}", begin + size)
        if kind in _FLOATS:
            name = f"{self._weights.name} byte {begin}"
            self.spans.append(FloatSpan(self._weights, name, begin, begin + size, _FLOATS[kind], infinite=True))

    def _size(self) -> int:
        if self._available is None:
            self._available = open_regular(self._weights)
            if is_shared(self._weights, self._weights.parent):
                raise Unsafe(
                    "EW-331",
                    "the weights of this graph are a hard link to a file outside of the folder",
                    where=self._weights.absolute(),
                    expected="a file of this folder alone",
                    fix="do not use this model; if it is your own, copy the folder: cp -r FOLDER COPY",
                )
        return self._available

    def _unsafe(self, what: str, expected: str, found: str) -> Unsafe:
        return Unsafe(
            "EW-335",
            f"this OpenVINO graph {what}",
            where=self._path.absolute(),
            expected=expected,
            found=found,
            fix="do not use this model, or export it again without extensions",
        )


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Broken(what, "a number that is not negative", printable(text))
    return int(text)
