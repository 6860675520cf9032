"""The assignment: the one file in which you write. README.md explains it.

    python grade.py          your points, in seconds

Replace each `raise NotImplementedError`; keep the names and the arguments. You may add functions,
and import torch, numpy and Python's own library. Letters: B batch, T target length, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PAD = 0  # padding; it stands only at the end of a row
START = 0  # what the decoder reads first; T5 uses the padding id for it
END = 1  # the last token of every target


# ---- Training: scheduled sampling of the label in the prompt


def p_linear(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """P(the label in the explain prompt is the predicted one) at an update, 0 to 1.

    step, steps  this update, counted from 0, and the number of all updates
    warmup       share of all updates, 0 to 1, in which P is 0
    ramp         share of all updates, 0 to 1; they follow the warm-up
    cap          the highest P, 0 to 1

    Let i be the number of updates since the warm-up, warmup * steps, and n = ramp * steps; both
    may be fractions. P rises from 0 at i = 0 with slope 1 / n, so a cap below 1 is reached before
    the end of the ramp. P is never above the cap. From i = n on it is the cap, also where n is 0.
    """
    raise NotImplementedError


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """A coin for each of n examples: True with probability p, each independent of the others.

    All randomness comes from `generator`.
    """
    raise NotImplementedError


def mix_labels(
    gold: list[str],
    questions: list[str],
    labels: list[str],
    coins: list[bool],
    predict: Callable[[list[str]], list[str]],
) -> tuple[list[str], dict[str, int]]:
    """The labels that B explain prompts show, and counts.

    gold, questions  of B examples; they stay as they are, since the losses need them
    labels           all valid labels
    coins            True: the prompt shows the label that the model predicts, if it is one of
                     `labels`, exactly. Otherwise the prompt shows the gold label
    predict          questions -> predicted labels, in the same order. Predicting is expensive: ask
                     once for each example whose coin is True, and for no other

    The counts are a dict with these keys:
        used_predicted     prompts that show a predicted label, right or wrong
        wrong_predicted    those of them that show a wrong one
        invalid_predicted  predictions that are none of `labels`
    """
    raise NotImplementedError


def explain_prompts(labels: list[str], questions: list[str]) -> list[str]:
    """The B prompts for a rationale: `given label: {label}, explain: {question}`."""
    raise NotImplementedError


def stage2_loss(
    token_loss: Callable[[list[str], list[str]], Tensor],
    questions: list[str],
    gold: list[str],
    given: list[str],
    rationales: list[str],
    alpha: float,
) -> Tensor:
    """The loss of stage 2 for a batch, L = alpha L_predict + (1 - alpha) L_explain: a scalar.

    token_loss             prompts, targets -> the loss per target token, a scalar tensor; call it
                           once for each of the two tasks, with all B examples
    questions, rationales  of B examples; the rationales are the gold ones
    gold, given            the gold labels, and the labels that mix_labels chose

    L_predict is the loss of the task `predict: {question}`, L_explain that of the explain prompts.
    Which labels and rationales are prompts and targets of which task: see the handout.
    """
    raise NotImplementedError


# ---- Measuring: what training showed, and what the model learned from it


def dose(log: list[dict]) -> float:
    """The share, 0-100, of stage 2's explain prompts that showed a wrong label.

    The log has a line per update. Each has "stage", 1 or 2; those of stage 2 have "prompts", the
    explain prompts of the update, and "wrong_predicted", how many of them showed a wrong label.
    Without an update of stage 2 the dose is math.nan.
    """
    raise NotImplementedError


def exposure_gap(
    statistic: Callable[[np.ndarray], float], gold: np.ndarray, own: np.ndarray
) -> float:
    """How much better the rationales are under the gold label than under the predicted label.

    statistic  the rows of some notes, (n, ...) -> a score; higher is better. Corpus BLEU is one:
               the score of many notes is not the mean of their scores
    gold, own  a row per note, of its rationale under the gold and under the predicted label
    """
    raise NotImplementedError


def gap_interval(
    statistic: Callable[[np.ndarray], float],
    gold: np.ndarray,
    own: np.ndarray,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The 95 % interval (low, high) of the exposure gap, by the paired percentile bootstrap.

    Draw n of the n notes with replacement, 1000 times, with `rng` alone; compute the gap of each
    draw with `statistic`. The interval reaches from the 2.5th to the 97.5th percentile of the
    1000 gaps. Row i of `gold` and row i of `own` belong to one note, so they are drawn together.
    """
    raise NotImplementedError


def following(flipped: list[str], predicted: list[str], argued: list[str | None]) -> float:
    """The share, 0-100, of rationales that argue for the flipped label in their prompt.

    flipped    the label in each prompt, a wrong one that we put there
    predicted  the label that the model itself predicts for each note
    argued     the label that each rationale argues for; None, for no single one, does not follow

    Where the flipped label is also the predicted one, a rationale argues for it anyway: leave
    these notes out. If none is left, the share is math.nan.
    """
    raise NotImplementedError


# ---- Exposure bias at the level of the token


def shift_right(targets: Tensor) -> Tensor:
    """What the decoder reads in training, the true prefix: (B, T) token ids -> (B, T), int64.

    At position t it reads the target of position t - 1, and START at position 0. `targets` stays
    as it is.
    """
    raise NotImplementedError


def greedy_decode(
    next_logits: Callable[[Tensor], Tensor], rows: int, max_new_tokens: int
) -> Tensor:
    """What the model writes when it reads its own prefix: (B, T) token ids, int64, for B = rows.

    next_logits maps what was read so far, (B, t) ids whose first column is START, to the logits
    (B, V) of the next token. Take the likeliest each time. END ends a row; after it stands PAD.
    Stop when all rows have ended, or at max_new_tokens: T is the number of calls. The result is
    without START.
    """
    raise NotImplementedError


def error_by_position(tokens: Tensor, targets: Tensor) -> list[float]:
    """The share, 0-100, of wrong tokens at each of the T positions. Both are (B, T), T >= 1.

    At each position only rows count whose target has not ended there: PAD in `targets` never
    counts. At least one row has a target at each position.
    """
    raise NotImplementedError
