"""Exposure bias at the level of the task: the one file of the assignment in which you write.

README.md beside this file explains the problems, their points and the grader. From the root of
the repository, grade yourself with

    python -m pytest -q notebooks/assignment

Replace each `raise NotImplementedError`; keep the names and the arguments. You may add functions,
and import torch, numpy and Python's own library. Do not import r2d, model, data or metrics: they
hold a solution.

Letters: B batch, S source length, T target length, V vocabulary. Every score is on a 0-100 scale.
"""

from collections.abc import Callable

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
#     ramp         share of all updates, 0 to 1, in which P then rises. Let n = ramp * steps, and
#                  i the number of updates since the end of the warm-up; both may be fractions
#     cap          P from i = n on, 0 to 1
#
# P is 0 for i < 0 and `cap` for i >= n. A cap of 0 switches sampling off: P is 0 everywhere.
# Only 0 <= i < n differs.


def p_linear(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_linear. P = i / n, but never above `cap` (Reason2Decide, section 3).

    So the line has the slope 1 / n whatever the cap is, and reaches the cap at i = cap * n.
    """
    raise NotImplementedError


def p_exponential(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_exponential. epsilon = k^i, with the one k for which P is `cap` at i = n.

    The curve never reaches 1: find k with min(cap, 1 - 1e-6) in the place of `cap`.
    """
    raise NotImplementedError


def p_inverse_sigmoid(step: int, steps: int, warmup: float, ramp: float, cap: float) -> float:
    """Problem schedule_inverse_sigmoid. epsilon = k / (k + e^(i/k)), with k such as above.

    It starts at P = 1 / (k + 1), a little above 0. There is no closed form for k: write down the
    log odds of P at i = n, see that they fall as k grows, and search. P must be right to 1e-6. As
    above, use min(cap, 1 - 1e-6).
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Coin and prompts.


def draw_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """Problem coin. One independent coin per example, True with probability `p`: n bools.

    All randomness comes from `generator`; the global random state of torch stays as it is.
    """
    raise NotImplementedError


def explain_batch(
    examples: list[dict[str, str]],
    labels: list[str],
    coins: list[bool],
    predict: Callable[[list[str]], list[str]],
    training: bool,
) -> tuple[list[str], list[str]]:
    """Problem mix_prompts. The explain task of stage 2 for a batch: B prompts and B targets.

    examples  B dicts with "question", "label" (gold) and "rationale" (gold); do not change them
    labels    all valid labels
    coins     B bools. True: the prompt gets the predicted label if it is one of `labels`; else
              gold stays
    predict   questions -> the labels that the model predicts for them, in the same order. It costs
              a generation per question: ask it only about examples whose coin is True
    training  False: no sampling, whatever the coins say

    A prompt is `given label: {label}, explain: {question}`. A target is the gold rationale,
    whichever label is in the prompt (Reason2Decide, section 3).
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Teacher forcing.


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
    but padding has loss 0. The result can be differentiated.
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Greedy decoding.


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
    mean of the four precisions, times the brevity penalty for the lengths of the whole corpus.

    Smoothing is sacreBLEU's default, "exp": going from n = 1 to 4, the k-th precision without a
    match gets 1/2^k matches. The score is 0 if no word matches, or if some order has no n-grams.
    """
    raise NotImplementedError


def macro_f1(gold: list[str], predicted: list[str], labels: list[str]) -> float:
    """Problem macro_f1. The unweighted mean of the F1 of every label in `labels`, 0-100; 0/0 is 0.

    A prediction that is none of `labels` is a miss for its gold label and no false alarm for any.
    A label that never occurs still counts.
    """
    raise NotImplementedError


def exposure_gap(gold_scores: list[float], predicted_scores: list[float]) -> float:
    """Problem exposure_gap. How much worse the rationales are under the predicted label.

    The two lists are rows of the table: one score per test note, higher is better, for the
    rationale under the gold label and under the predicted label. The gap is in points of the
    score, and positive where gold is better.
    """
    raise NotImplementedError


def following(flipped: list[str], predicted: list[str], argued: list[str | None]) -> float:
    """Problem following. The share, 0-100, of texts that argue for the flipped label given to them.

    flipped    the label in each prompt, a wrong one put there by us
    predicted  the label that the model itself predicts for each note
    argued     the label that each rationale argues for, None if it argues for none or for two

    Notes whose flipped label is also the predicted one do not count: there the text would argue
    for it anyway. If no note is left, the share is math.nan.
    """
    raise NotImplementedError
