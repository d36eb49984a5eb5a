"""What calibration gains: KL to the checkpoint, in the runtime itself, on text that calibration never saw.

    python benchmarks/calibration.py [--stories DIR] [--tokens 32768] [--held-out 8192] [--only NAME]

The 4-bit files of the shipped teacher (calibrated on the part of the standard library that it was trained on, judged on
the held-out part) and, where it is there, of stories260K (calibrated on the head of the training text, judged on the
validation text): plain rounding, searched scales and GPTQ, all in the same bytes. Bar: KL of GPTQ <= 0.7 x plain.
"bits per byte" is what predicting the held-out text costs, over what the checkpoint itself needs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import ROOT, header

from edgewright.data import StdlibData, TrainTokenizer, iterate_documents
from edgewright.evaluate import evaluate_session, windows
from edgewright.export.artifact import size_of
from edgewright.export.calibration.calibrate import calibrate
from edgewright.export.calibration.calibrated import COLUMNS
from edgewright.export.runtimes.opening import open_session
from edgewright.export.runtimes.session import Session
from edgewright.export.source import Source, load_source
from edgewright.export.targets import TARGETS, make

BAR = 0.7
WINDOW = 256
DOCUMENT = 8_000
"""Characters of a document that are used, so that many have a say."""

FORMATS = (("gguf", "q4_0", "f16"), ("gguf", "q4_0", "q4_0"), ("genai", "int4", "int8"), ("genai", "int4", "int4"))
"""Target, width, width of token embedding and head."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model, text to calibrate on, text to judge on."""

    name: str
    source: Source
    calibration: Path
    held_out: list[str]


def stdlib(split: str) -> list[str]:
    """The heads of the standard library's files, in a fixed random order; tables of characters are no text."""
    data = StdlibData(type="stdlib", tokenizer=TrainTokenizer())
    found = [text[:DOCUMENT] for name, text in iterate_documents(data, split=split) if "encodings/" not in name]
    random.Random(0).shuffle(found)
    return found


def cases(work: Path, stories: Path) -> Iterator[Case]:
    """The models that are there."""
    calibration = work / "stdlib.jsonl"
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib("train")), encoding="utf-8")
    yield Case("teacher", load_source(ROOT / "examples/teacher"), calibration, stdlib("held_out"))
    texts = stories.parent / "tinystories"
    if stories.is_dir() and texts.is_dir():
        held_out = [text for _, text in iterate_documents(str(texts / "valid_head.txt.xz"))]
        yield Case("stories260K", load_source(stories), texts / "train_prefix_2MiB.txt.xz", held_out)


class Judge:
    """The checkpoint's own predictions on held-out text, and how far another session is from them."""

    def __init__(self, reference: Session, texts: list[str], tokens: int) -> None:
        self.documents = [(reference.tokenize(text), len(text.encode())) for text in texts]
        self.tokens = tokens
        parts = [part for ids, _ in self.documents for part, _ in windows([reference.start_id, *ids], WINDOW)]
        self.parts = parts[: max(1, tokens // WINDOW)]
        self.right = [self._log_probabilities(reference, part) for part in self.parts]
        self.bits = self.bits_per_byte(reference)

    def kl(self, session: Session) -> float:
        """Nats per token."""
        rows = [
            (np.exp(right) * (right - self._log_probabilities(session, part))).sum(axis=1)
            for right, part in zip(self.right, self.parts, strict=True)
        ]
        return float(np.concatenate(rows).mean())

    def bits_per_byte(self, session: Session) -> float:
        """Of the held-out text."""
        return evaluate_session(session, self.documents, max_tokens=self.tokens, window=WINDOW).bits_per_byte

    @staticmethod
    def _log_probabilities(session: Session, part: list[int]) -> np.ndarray:
        session.rewind(0)
        logits = session.append(part, "all")
        assert logits is not None
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def line(case: Case, judge: Judge, work: Path, form: tuple[str, str, str], tokens: int) -> float:
    """Print the row of one model in one format; the ratio that the bar is about."""
    to, quant, embedding = form
    kls, bits, sizes = [], [], set()
    for method in (None, "search", "gptq"):
        source = case.source
        if method is not None:
            source = calibrate(
                source, files=[case.calibration], method=method, max_tokens=tokens, columns_of=COLUMNS.get(to, 1),
                embedding_bits=4 if embedding == quant else None, threads=1,
            )  # fmt: skip
        place = work / f"{case.name}-{to}-{embedding}-{method}{TARGETS[to].suffix or ''}"
        make(source, place, to=to, quant=quant, embedding_quant=embedding, verify=False, max_kl=None, threads=1)
        with open_session(place, threads=1) as session:
            kls.append(judge.kl(session))
            bits.append(judge.bits_per_byte(session) / judge.bits)
        sizes.add(size_of(place))
    assert len(sizes) == 1, f"calibration changed the size: {sizes}"
    ratio = kls[2] / kls[0]
    print(
        f"| {case.name} | {to} {quant}, embedding {embedding} | {sizes.pop():,} | {kls[0]:.4f} | {kls[1]:.4f} | "
        f"{kls[2]:.4f} | {kls[1] / kls[0]:.2f} | **{ratio:.2f}** | {' / '.join(f'{value:.4f}' for value in bits)} |",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared/data/stories260K")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration text")
    parser.add_argument("--held-out", type=int, default=8_192, help="tokens to judge on")
    parser.add_argument("--only", help="one model")
    arguments = parser.parse_args()
    header()
    print(f"calibrated on {arguments.tokens:,} tokens, judged on {arguments.held_out:,} others; KL in nats per token\n")
    print("| model | file | bytes | KL plain | KL search | KL gptq | search | gptq | bits per byte x checkpoint |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for case in cases(Path(name), arguments.stories):
            if arguments.only not in (None, case.name):
                continue
            with open_session(case.source.directory, threads=1) as reference:
                judge = Judge(reference, case.held_out, arguments.held_out)
            ratios += [line(case, judge, Path(name), form, arguments.tokens) for form in FORMATS]
    print(f"\ngptq / plain: at most {max(ratios):.2f}, bar {BAR}: {'met' if max(ratios) <= BAR else 'MISSED'}")
    sys.exit(max(ratios) > BAR)


if __name__ == "__main__":
    main()
