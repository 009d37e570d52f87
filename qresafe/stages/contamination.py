"""Calibration prompts that are also evaluated, word for word or nearly so: found and dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from qresafe.errors import DataError
from qresafe.stages.comparison import Contamination, Overlap

GRAM = 5  # characters
MEASURE = f"Jaccard similarity of character {GRAM}-grams"
ROWS_AT_A_TIME = 1000  # calibration prompts whose similarities are in memory together
EXAMPLES = 5


def decontaminate(
    pool: pa.Table, asked: pa.Table, threshold: float
) -> tuple[pa.Table, Contamination]:
    """Drop the calibration prompts that equal or nearly equal an evaluation prompt.

    Texts are compared in lower case, without punctuation and with single spaces. Those that agree
    are duplicates; those whose sets of character 5-grams have a Jaccard similarity of at least
    `threshold` are near-duplicates (Broder 1997). The similarity is exact, not MinHash's estimate:
    a product of two sparse matrices.

    Args:
        pool: Calibration prompts (`records.PROMPT`).
        asked: Evaluation prompts.
        threshold: In (0, 1].

    Returns:
        What is left of the pool, and what was found.

    Raises:
        DataError: Nothing is left.
    """
    calibration, evaluation = _normal(pool), _normal(asked)
    best, where = nearest(calibration, evaluation)
    places = set(evaluation)
    exact = np.array([text in places for text in calibration])
    near = ~exact & (best >= threshold)
    kept = pool.filter(pa.array(~(exact | near)))
    if kept.num_rows == 0:
        what = f"all {pool.num_rows} calibration prompts are evaluated too"
        remedy = "take other prompts into pairs.path, pairs.prompts or evaluate.prompts"
        raise DataError(what, where="the experiment", remedy=remedy)
    left = best[~(exact | near)]
    ids, others = pool["prompt_id"].to_pylist(), asked["prompt_id"].to_pylist()
    worst = sorted((exact | near).nonzero()[0], key=lambda row: (-best[row], row))[:EXAMPLES]
    return kept, Contamination(
        calibration=pool.num_rows,
        evaluation=asked.num_rows,
        exact=int(exact.sum()),
        near=int(near.sum()),
        measure=MEASURE,
        threshold=threshold,
        highest_kept=round(float(left.max()), 4),
        examples=[
            Overlap(
                calibration=ids[row],
                evaluation=others[where[row]],
                similarity=round(float(best[row]), 4),
            )
            for row in worst
        ],
    )


def nearest(texts: Sequence[str], others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return each text's highest similarity to any of the others, and that one's place.

    Args:
        texts: Normalised.
        others: Normalised; at least one.

    Returns:
        Similarities in [0, 1] and places, one per text.
    """
    vocabulary: dict[str, int] = {}
    first, second = _incidence(texts, vocabulary), _incidence(others, vocabulary)
    # Columns were added while the second set was read.
    first.resize(first.shape[0], len(vocabulary))
    sizes = np.asarray(second.sum(axis=1)).ravel()
    best, where = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    for start in range(0, len(texts), ROWS_AT_A_TIME):
        rows = first[start : start + ROWS_AT_A_TIME]
        shared = (rows @ second.T).toarray()
        union = np.asarray(rows.sum(axis=1)) + sizes[None, :] - shared
        similarity = shared / union
        stop = start + rows.shape[0]
        best[start:stop] = similarity.max(axis=1)
        where[start:stop] = similarity.argmax(axis=1)
    return best, where


def normalise(text: str) -> str:
    """Return a text in lower case, words separated by single spaces, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _normal(table: pa.Table) -> list[str]:
    return [normalise(text) for text in table["prompt"].to_pylist()]


def _incidence(texts: Sequence[str], vocabulary: dict[str, int]) -> Any:
    """Return the (texts, grams) matrix of ones, and add new grams to the vocabulary."""
    columns = [[vocabulary.setdefault(g, len(vocabulary)) for g in grams(text)] for text in texts]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.fromiter((column for row in columns for column in row), np.int32, ends[-1])
    shape = (len(texts), len(vocabulary))
    return sparse.csr_matrix((np.ones(len(flat), np.int32), flat, ends), shape=shape)


def grams(text: str) -> Iterator[str]:
    """Yield the distinct runs of `GRAM` characters of a text; a shorter text is one run."""
    found = {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}
    return iter(sorted(found))
