"""Scores of generated text against a reference."""

import re


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004) in [0, 1]: the longest common subsequence of the two texts' words.

    precision = LCS / words of the prediction, recall = LCS / words of the reference, F1 their
    harmonic mean. Words are runs of letters and digits, lower case. Two texts without words score
    0.
    """
    a, b = _words(prediction), _words(reference)
    common = _longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    best = [0] * (len(b) + 1)  # best[j]: for the words of a so far and the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]
