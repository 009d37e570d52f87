"""Would a small classifier judge better than rules? Trained on two XSTest files, scored on one.

    python -m bench.judge_classifier    # prints the table that docs/judges.md speaks of; a minute

Logistic regression with a ridge penalty on words, pairs and triples of the opening. Words of the
prompt are masked, and the prompts scored are others than those trained on, because all files
answer the same prompts.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from scipy import optimize, sparse, special

from bench.judges import FOLDER, Answer, outcomes, read
from qresafe.judges.base import straighten
from qresafe.judges.refusal import opening_of
from qresafe.records import REFUSALS
from qresafe.registry import judges

FOLDS = 5
RARE = 8  # a feature of fewer training answers is dropped
RIDGE = 5.0
_TOKEN = re.compile(r"[a-z']+|[.!?:]")
_COMMON = {"i", "you", "a", "an", "the", "is", "are", "to", "of", "in", "it", "not", "can", "my"}
_COMMON |= {"do", "be", "and", "or", "for", "how", "what"}


def features(answer: Answer) -> set[str]:
    """Return the words, pairs and triples of an answer's opening, and its axis."""
    asked = set(_TOKEN.findall(straighten(answer.prompt).lower())) - _COMMON
    opening = opening_of(straighten(answer.completion).strip())[0]
    words = ["_" if word in asked else word for word in _TOKEN.findall(opening)]
    grams = {" ".join(words[i : i + k]) for k in (1, 2, 3) for i in range(len(words) - k + 1)}
    return grams | {f"axis {answer.axis}"}


def with_rules(answer: Answer) -> set[str]:
    """Return the same and the rule that decided."""
    said = judges.get("refusal")(answer.axis, answer.prompt, answer.completion)
    return features(answer) | {f"rule {said.reason.partition(':')[0]}", f"says {said.outcome}"}


def fit(rows: sparse.csr_matrix, refused: np.ndarray) -> np.ndarray:
    """Return the weights, the intercept last, that minimise the penalised log loss."""
    signs = 2 * refused - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (rows @ weights[:-1] + weights[-1])
        slope = -signs * special.expit(-margins)
        gradient = np.append(rows.T @ slope + RIDGE * weights[:-1], slope.sum())
        penalty = RIDGE / 2 * weights[:-1] @ weights[:-1]
        return float(np.logaddexp(0, -margins).sum() + penalty), gradient

    start = np.zeros(rows.shape[1] + 1)
    return optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x


def score(train: list[tuple[set[str], bool]], test: list[tuple[set[str], bool]]) -> int:
    """Return how many of `test` are judged as people did, after training on `train`."""
    counts = Counter(name for names, _ in train for name in names)
    columns = {n: i for i, n in enumerate(sorted(n for n, c in counts.items() if c >= RARE))}
    weights = fit(_matrix(train, columns), np.array([refused for _, refused in train], float))
    said = _matrix(test, columns) @ weights[:-1] + weights[-1] > 0
    return int((said == np.array([refused for _, refused in test])).sum())


def _matrix(rows: list[tuple[set[str], bool]], columns: dict[str, int]) -> sparse.csr_matrix:
    cells = [(i, columns[n]) for i, (names, _) in enumerate(rows) for n in names if n in columns]
    where = tuple(zip(*cells, strict=True))
    return sparse.csr_matrix((np.ones(len(cells)), where), (len(rows), len(columns)))


def main() -> None:
    """Print the agreement on each file of the classifier, of both together, and of the rules."""
    files = {p.stem.rpartition("_")[2]: read(p) for p in sorted(FOLDER.glob("*completions_*"))}
    print("| answers of | n-grams | n-grams and rules | rules |\n|---|---:|---:|---:|")
    for model, answers in files.items():
        cells = []
        for describe in (features, with_rules):
            rows = {
                name: [(describe(a), a.people in REFUSALS) for a in seen]
                for name, seen in files.items()
            }
            right = 0
            for fold in range(FOLDS):
                train = [
                    row
                    for name in rows
                    if name != model
                    for i, row in enumerate(rows[name])
                    if i % FOLDS != fold
                ]
                right += score(train, rows[model][fold::FOLDS])
            cells.append(right / len(answers))
        said = outcomes(judges.get("refusal"), answers)
        pairs = zip(said, answers, strict=True)
        cells.append(sum((s in REFUSALS) == (a.people in REFUSALS) for s, a in pairs) / len(said))
        print(f"| {model} | {' | '.join(f'{100 * share:.1f}' for share in cells)} |")


if __name__ == "__main__":
    main()
