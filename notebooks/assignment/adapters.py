"""Exposure bias at the level of the task: the one file of the assignment in which you write.

README.md beside this file explains the problems, their points and the grader. From the root of
the repository, grade yourself with

    python -m pytest -q notebooks/assignment

Replace each `raise NotImplementedError`; keep the names and the arguments. You may add functions,
and import torch, numpy and Python's own library.

Letters: B batch, S source length, T target length, V vocabulary, n notes. Every score is on a
0-100 scale.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

PAD = 0  # padding; it stands only at the end of a row
START = 0  # what the decoder reads first; T5 uses the padding id for it
END = 1  # the last token of every target

# --------------------------------------------------------------------------------------------------
# Schedules. All three return P(the label in the explain prompt is the predicted one), a number
# from 0 to 1. Bengio et al. (2015, arXiv 1506.03099, section 2.4) write epsilon = 1 - P.
#
#     step, steps  the current update, counted from 0, and the number of all updates
#     warmup       share of all updates, 0 to 1, in which P is 0
#     ramp         share of all updates, 0 to 1, that a rise from 0 to 1 (linear) or to the cap (the
#                  two others) takes after that
#     cap          the highest P, 0 to 1
#
# Let i = step - warmup * steps, the number of updates since the warm-up, and n = ramp * steps.
# Both may be fractions. P is 0 for i < 0, and P is `cap` for i >= n. A cap of 0 switches sampling
# off: P is 0 everywhere. Only for 0 <= i < n, on the ramp, do the three curves differ. P must be
# right to 1e-4.


def p_linear(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_linear. On the ramp P = i / n, but never above `cap`.

    So the line has the slope 1 / n whatever the cap is, and reaches the cap at i = cap * n.
    """
    raise NotImplementedError


def p_exponential(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_exponential. On the ramp epsilon = k^i, with the k for which P = e at i = n.

    Here e = min(cap, 1 - 1e-6), since the curve never reaches 1.
    """
    raise NotImplementedError


def p_inverse_sigmoid(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_inverse_sigmoid. On the ramp epsilon = k / (k + e^(i/k)), for a k > 0.

    The k is the one for which P = min(cap, 1 - 1e-6) at i = n. There is no closed form for it:
    search. As k grows, the log odds of P at i = n, which are n/k - ln(k), fall. The curve starts
    at P = 1 / (k + 1), a little above 0.
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# The coin and the prompts.


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """Problem coin. One independent coin per example, True with probability `p`: n bools.

    All randomness comes from `generator`. The global random state of torch stays as it is.
    """
    raise NotImplementedError


def mix_labels(
    gold: list[str],
    questions: list[str],
    labels: list[str],
    coins: list[bool],
    predict: Callable[[list[str]], list[str]],
) -> tuple[list[str], dict[str, int]]:
    """Problem mix_labels. The labels that B explain prompts show, and three counts.

    gold       B gold labels. `gold`, `questions`, `labels` and `coins` stay as they are
    questions  B questions
    labels     all valid labels
    coins      B bools. True: the prompt shows the predicted label if that is one of `labels`,
               exactly; else it shows gold
    predict    questions -> the labels that the model predicts for them, in the same order. It
               costs a generation per question: ask about each example whose coin is True, once,
               and about no other

    The counts, a dict with the keys
        used_predicted     prompts that show a predicted label, right or wrong
        wrong_predicted    those of them whose predicted label is not the gold one
        invalid_predicted  predictions that are none of `labels`
    """
    raise NotImplementedError


def explain_prompts(labels: list[str], questions: list[str]) -> list[str]:
    """Problem prompts. B labels and B questions -> B prompts.

    A prompt is `given label: {label}, explain: {question}`. The target that belongs to it is the
    gold rationale, whatever the label is.
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# What a run has been given, and what it learned.


def dose(log: list[dict], batch_size: int) -> float:
    """Problem dose. The share, 0-100, of stage 2's explain prompts that held a wrong label.

    log         the lines of a run's log.jsonl, one per update. Each has "stage", 1 or 2; those of
                stage 2 have "wrong_predicted", the number of prompts with a wrong predicted label
    batch_size  prompts per update

    The share is over all prompts of all updates of stage 2. If there is no such update, it is
    math.nan.
    """
    raise NotImplementedError


def exposure_gap(
    statistic: Callable[[np.ndarray], float], gold: np.ndarray, own: np.ndarray
) -> float:
    """Problem exposure_gap. How much worse the rationales are under the model's own label.

    statistic  the rows of some notes, an array (n, ...) -> one score; higher is better. It need
               not be a mean over the rows: corpus BLEU is not
    gold, own  a row per test note, of its rationale under the gold label and under the model's
               own; row i of both belongs to note i. They stay as they are

    The gap is in points of the score, positive where gold is better.
    """
    raise NotImplementedError


def gap_interval(
    statistic: Callable[[np.ndarray], float],
    gold: np.ndarray,
    own: np.ndarray,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Problem gap_interval. The 95 % interval of the exposure gap over the notes: (low, high).

    The percentile bootstrap (Efron 1979): draw n notes with replacement, 1000 times, with `rng`
    alone, for instance by rng.integers(0, n, n); the gap of each draw is computed on its notes. The
    interval goes from the 2.5th to the 97.5th percentile of the 1000 gaps. Both rows of a note
    are drawn together: the data are paired.
    """
    raise NotImplementedError


def following(flipped: list[str], predicted: list[str], argued: list[str | None]) -> float:
    """Problem following. The share, 0-100, of texts that argue for the flipped label given to them.

    flipped    the label in each prompt, a wrong one put there by us
    predicted  the label that the model itself predicts for each note
    argued     the label that each rationale argues for, None if it argues for none or for two;
               such a text does not follow, and counts

    Notes whose flipped label is also the predicted one do not count: there the text would argue
    for it anyway. If no note is left, the share is math.nan.
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Teacher forcing and greedy decoding: exposure bias at the level of the token.


def shift_right(targets: Tensor) -> Tensor:
    """Problem shift_right. Target tokens (B, T), int64 -> what the decoder reads: (B, T), int64.

    At position t the decoder reads the target token of position t - 1, and START at position 0.
    `targets` stays as it is.
    """
    raise NotImplementedError


def token_mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Problem masked_loss. Cross-entropy in nats, the mean over all target tokens: a scalar tensor.

    logits (B, T, V), float, already aligned: logits[b, t] predicts targets[b, t]. targets (B, T),
    int64. Padding counts nothing, neither above nor below the fraction line; a batch of nothing
    but padding has loss 0. Gradients flow back to the logits.
    """
    raise NotImplementedError


def greedy_decode(model: nn.Module, source: Tensor, max_new_tokens: int) -> Tensor:
    """Problem greedy_decode. The likeliest token, again and again: (B, S), int64 -> (B, T), int64.

    `model(source, decoder_input)` takes (B, S) and (B, t), with START first, and returns logits
    (B, t, V): those at the last position are for the next token. A row ends with END; after it
    stands PAD. Decoding stops when all rows have ended, or at `max_new_tokens`, so T is the number
    of times that the model was called.

    The model decodes in eval mode (dropout off) and without gradients. Afterwards it is in the
    mode in which it came, and gradients are on again if they were on.
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Scores.


def corpus_bleu(hypotheses: list[list[str]], references: list[list[str]]) -> float:
    """Problem corpus_bleu. BLEU (Papineni et al. 2002) of all pairs of texts together, 0-100.

    Texts are lists of tokens. For n = 1 to 4, matches and n-grams are counted over the whole
    corpus, each match clipped at its count in the reference of its pair. The score is the geometric
    mean of the four precisions (matches / n-grams of the hypotheses), times the brevity penalty:
    e^(1 - r/h) where all hypotheses together have h tokens, all references r, and h < r; else 1.

    Smoothing is sacreBLEU's default, "exp": going from n = 1 to 4, the first precision without a
    match gets 1/2 matches, the second 1/4, the third 1/8. The score is 0 if no word matches, or if
    some order has no n-grams.
    """
    raise NotImplementedError


def macro_f1(gold: list[str], predicted: list[str], labels: list[str]) -> float:
    """Problem macro_f1. The unweighted mean of the F1 of every label in `labels`, 0-100; 0/0 is 0.

    A prediction that is none of `labels` is a miss for its gold label and no false alarm for any.
    A label that never occurs still counts.
    """
    raise NotImplementedError
