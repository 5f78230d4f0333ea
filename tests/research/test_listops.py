"""Compare the values of ListOps expressions with Python's own evaluation; test their shape and the rules' scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.systems.listops import (
    TOKENS,
    ListOps,
    evaluate_tree,
    get_root,
    get_root_and_digits,
    list_tokens,
    score_rule,
)

NUMPYS = {
    'MIN': np.min,
    'MAX': np.max,
    'MED': lambda values: int(np.median(values)),
    'SM': lambda values: np.remainder(np.sum(values), 10),
}


def by_python(read: list[str]) -> int:
    """Return the value of an expression, from its tokens as a Python expression of calls."""
    code = ''.join(f'{t[1:]}([' if t[0] == '[' else ']),' if t == ']' else f'{t},' for t in read)
    return eval(code.rstrip(','), dict(NUMPYS))


def depth(read: list[str]) -> int:
    return max(np.cumsum([token.startswith('[') - (token == ']') for token in read]))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(3, 6), st.integers(5, 10), st.integers(15, 40))
def test_expressions_have_the_requested_shape_and_pythons_value(seed, nested, arguments, shortest, longest):
    system = ListOps(shortest=shortest, tokens=longest, depth=nested, arguments=arguments)
    inputs, targets = system.draw(4, torch.Generator().manual_seed(seed))
    trees = system.draw_trees(4, torch.Generator().manual_seed(seed))
    assert inputs.shape == (4, longest)
    for row, target, tree in zip(inputs, targets, trees):
        read = [TOKENS[number] for number in row if TOKENS[number]]
        assert read == list_tokens(tree)
        assert [TOKENS[number] for number in row[len(read) :]] == [''] * (longest - len(read))
        assert shortest <= len(read) <= longest and depth(read) <= nested
        assert by_python(read) == target.item() == evaluate_tree(tree)


def test_every_depth_number_of_arguments_and_operator_occurs():
    trees = ListOps().draw_trees(300, torch.Generator().manual_seed(0))
    assert {depth(list_tokens(tree)) for tree in trees} == {2, 3}
    assert {len(tree[1]) for tree in trees} == {2, 3, 4, 5} and {tree[0] for tree in trees} == set(NUMPYS)
    inner = [argument for tree in trees for argument in tree[1]]
    assert {argument for argument in inner if isinstance(argument, int)} == set(range(10))


def test_a_rule_scores_as_its_input_allows():
    trees = ListOps().draw_trees(2000, torch.Generator().manual_seed(0))
    values = np.array([by_python(list_tokens(tree)) for tree in trees])
    own = np.array([list_tokens(tree)[0] for tree in trees])
    counts = [np.bincount(values[own == name]).max() for name in np.unique(own)]
    assert score_rule(get_root, trees, trees) == pytest.approx(sum(counts) / 2000)
    assert score_rule(evaluate_tree, trees, trees) == 1 and score_rule(evaluate_tree, [], trees) == 0
    flat = [('SM', [1, 2, 9]), ('MED', [1, 2, 4, 9]), ('MAX', [3, 3])]
    assert [evaluate_tree(tree) for tree in flat] == [2, 3, 3]
    assert score_rule(get_root_and_digits, flat, [('SM', [9, 9, 4]), ('MED', [3, 3, 4, 4]), ('MAX', [3, 1])]) == 1
