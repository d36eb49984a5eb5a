"""The texts on which the gate compares two models: real ones, so that perplexity means something.

Written for this purpose, short enough to ship, long enough for 128 tokens in any common vocabulary.
"""

from __future__ import annotations

PROSE = """Once upon a time, in a small house at the edge of the forest, there lived an old woman and her cat. Every \
morning she opened the window, put a bowl of milk on the step and waited for the sun to come over the trees. One day \
the cat did not come. "Where can he be?" she said, and she took her coat and her stick and went out to look for him. \
She asked the baker, who had seen nothing; she asked the children at the well, who had heard something cry in the \
night. At last she found him on the roof of the church, too proud to ask for help and too frightened to jump. It took \
the fire brigade two hours, three ladders and a fish to bring him down. From that day on he stayed on the ground, and \
the village had a story to tell: that the highest place is not always the best one, and that it is a long way home."""

CODE = '''def merge(left: list[int], right: list[int]) -> list[int]:
    """Join two sorted lists into one that is sorted as well."""
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: float = 1.5) -> None:
        if amount < 0:
            raise ValueError(f"amount must not be negative, got {amount!r}")
        self.value += int(amount * 100) / 100  # two digits


if __name__ == "__main__":
    print(merge([1, 4, 9], [2, 3, 10]), {"a": [0x1F, 1e-3, None]})
'''

MULTILINGUAL = """Der Fluss ist im Frühling so hoch, dass die Brücke gesperrt wird; wir müssen über den Berg. \
Où est la bibliothèque ? Elle est fermée jusqu'à lundi, mais le café d'à côté est ouvert. El niño soñó con un pingüino \
que hablaba español. Поезд в Москву отходит через десять минут с третьего пути. \
今日はとても寒いので、家で本を読みます。我们明天去北京看朋友。오늘은 날씨가 좋아요. \
कल बारिश होगी। السلام عليكم، كيف حالك اليوم؟ שלום, מה שלומך? \
Η θάλασσα είναι ήρεμη. Zażółć gęślą jaźń. Đây là một câu ngắn. Türkçe'de ığüşöç harfleri var. \
🙂👩‍👩‍👧‍👦🏳️‍🌈 ½ ≠ ∞ ﬁ e\u0301\u200b\ufeff."""

REAL = {"prose": PROSE, "code": CODE, "multilingual": MULTILINGUAL}

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b  # 12345 + 678\n",
    "x = {'key': [1, 2.5, -3e-4]}\t!?\n\n\n  indented   and spaced",
    "naïve café, Ünïcödé, Привет, 你好, שלום, 🙂",
    "I'm sure they'll say it's 1999's SHOUTING.",
    *REAL.values(),
)
"""Texts that both tokenizers must split alike."""
