"""Train a Nyströmformer to evaluate ListOps: nested operations on digits, whose result is a digit.

The grammar is that of Nangia & Bowman (2018) as the Long Range Arena generates it, at a size where rules without
nesting are weak. An argument is an operation with probability 0.25 if it may be nested further, and otherwise a digit.
Expressions that are too short or too long are drawn again. The model is transformers' Nyströmformer at its authors'
size for the Long Range Arena, with their weight decay of 0, so that C is an initialisation.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .runs import HELD_OUT, System

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    'MIN': min,
    'MAX': max,
    'MED': lambda values: int(statistics.median(values)),  # the mean of the middle two is rounded down
    'SM': lambda values: sum(values) % 10,
}
TOKENS = [*'0123456789', *(f'[{name}' for name in OPERATORS), ']', '']  # the last one is padding
NUMBER = {token: number for number, token in enumerate(TOKENS)}

Tree = int | tuple[str, list]  # a digit, or an operator and its arguments, which are trees


def evaluate_tree(tree: Tree) -> int:
    """Evaluate an expression; returns a digit."""
    return tree if isinstance(tree, int) else OPERATORS[tree[0]]([evaluate_tree(argument) for argument in tree[1]])


def list_tokens(tree: Tree) -> list[str]:
    """List the tokens of an expression."""
    if isinstance(tree, int):
        return [str(tree)]
    name, arguments = tree
    return [f'[{name}', *(token for argument in arguments for token in list_tokens(argument)), ']']


def grow_tree(rng: random.Random, depth: int, arguments: int) -> Tree:
    """Draw an operation of up to ``depth`` nested ones, each with 2 to ``arguments`` arguments."""
    nested = (depth > 1 and rng.random() < 0.25 for _ in range(rng.randint(2, arguments)))
    return (
        rng.choice(list(OPERATORS)),
        [grow_tree(rng, depth - 1, arguments) if deeper else rng.randrange(10) for deeper in nested],
    )


def get_root_digits(tree: Tree) -> list[int]:
    """Return the arguments of the root that are digits."""
    return [argument for argument in tree[1] if isinstance(argument, int)]


def get_root(tree: Tree) -> Hashable:
    """Return the input of a rule that reads only the root's operator."""
    return tree[0]


def get_root_and_digits(tree: Tree) -> Hashable:
    """Return the input of a rule that reads the root's operator, its result on the root's digits, and their number."""
    digits = get_root_digits(tree)
    return tree[0], OPERATORS[tree[0]](digits) if digits else None, len(digits), len(tree[1])


def score_rule(key: Callable[[Tree], Hashable], learned: list[Tree], tested: list[Tree]) -> float:
    """Return the accuracy of answering with the most frequent result among the learned expressions of the same key."""
    answers: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for tree in learned:
        answers[key(tree)][evaluate_tree(tree)] += 1
    best = {known: counted.most_common(1)[0][0] for known, counted in answers.items()}
    return sum(best.get(key(tree)) == evaluate_tree(tree) for tree in tested) / len(tested)


@dataclass(frozen=True)
class ListOps(System):
    """The ListOps system; see the module. ``shortest`` and ``tokens`` are lengths in tokens, brackets included."""

    steps: int = 500
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.0
    tests: int = 2000
    tokens: int = 32
    shortest: int = 10
    depth: int = 3
    arguments: int = 5
    layers: int = 2
    width: int = 64
    heads: int = 2
    landmarks: int = 8

    examples = 'expressions'

    @property
    def longest(self) -> int:
        """The largest length of an expression in tokens; the model's input is padded to ``tokens``."""
        return self.tokens

    def draw_trees(self, count: int, generator: torch.Generator) -> list[Tree]:
        """Draw expressions of the right length."""
        rng = random.Random(torch.randint(2**62, (), generator=generator).item())
        trees: list[Tree] = []
        while len(trees) < count:
            tree = grow_tree(rng, self.depth, self.arguments)
            if self.shortest <= len(list_tokens(tree)) <= self.longest:
                trees.append(tree)
        return trees

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        trees = self.draw_trees(count, generator)
        inputs = torch.full((count, self.tokens), NUMBER[''])
        for row, tree in zip(inputs, trees):
            numbers = [NUMBER[token] for token in list_tokens(tree)]
            row[: len(numbers)] = torch.tensor(numbers)
        return inputs, torch.tensor([evaluate_tree(tree) for tree in trees])

    def score_rules(self) -> dict[str, float]:
        learned = self.draw_trees(10 * self.tests, torch.Generator().manual_seed(HELD_OUT + 1))
        tested = self.draw_trees(self.tests, torch.Generator().manual_seed(HELD_OUT))
        return {
            "the root's operator": score_rule(get_root, learned, tested),
            'the root and its own digits': score_rule(get_root_and_digits, learned, tested),
        }

    def build_model(self) -> nn.Module:
        from transformers import NystromformerConfig, NystromformerForSequenceClassification

        config = NystromformerConfig(
            vocab_size=len(TOKENS),
            pad_token_id=None,  # padding is not masked: transformers 5 does not support a mask together with landmarks
            num_labels=10,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=2 * self.width,
            hidden_act='gelu',
            max_position_embeddings=self.tokens,
            segment_means_seq_len=self.tokens,
            num_landmarks=self.landmarks,
            conv_kernel_size=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return NystromformerForSequenceClassification(config)

    def compute_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).logits


@dataclass(frozen=True)
class PublishedListOps(ListOps):
    """ListOps at the size of the Long Range Arena (arXiv 2011.04006): about 50 GFLOP for a step of training.

    The input is padded from 2,000 to 2,048 tokens, because Nyströmformer needs a multiple of its landmarks.
    """

    steps: int = 5000
    tests: int = 20_000
    tokens: int = 2048
    longest: int = 2000
    shortest: int = 500
    depth: int = 10
    arguments: int = 10
    landmarks: int = 64
