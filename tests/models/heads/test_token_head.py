"""Which tokens of the vocabulary stand for action codes."""

import pytest
import torch

from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.token_head import TokenHead, action_token_ids


@pytest.mark.parametrize(
    "placing, expected",
    [
        ({}, [6, 7, 8, 9]),
        ({"skip": 2}, [4, 5, 6, 7]),
        ({"descending": True}, [9, 8, 7, 6]),
        ({"descending": True, "skip": 2}, [7, 6, 5, 4]),
        ({"first_token_id": 1}, [1, 2, 3, 4]),
        ({"first_token_id": 1, "descending": True}, [1, 2, 3, 4]),
    ],
)
def test_ids_of_four_codes_in_a_vocabulary_of_ten(placing, expected):
    assert action_token_ids(10, 4, **placing).tolist() == expected


@pytest.mark.parametrize("placing", [{"skip": 7}, {"first_token_id": 7}, {"first_token_id": -1}])
def test_codes_that_do_not_fit_are_refused(placing):
    with pytest.raises(ValueError, match="do not fit a vocabulary of 10.*added tokens"):
        action_token_ids(10, 4, **placing)


class Codec:
    """A codec of four codes that remembers where it was saved."""

    num_tokens, saved = 4, None

    def save(self, folder):
        self.saved = folder


@pytest.fixture
def head() -> TokenHead:
    head = TokenHead(HeadSizes(hidden_size=8, action_dim=2, horizon=2), skip=1)
    head.codec = Codec()
    return head


def test_the_head_places_its_codecs_tokens(head):
    assert torch.equal(head.token_ids(10), action_token_ids(10, 4, skip=1))


def test_the_head_saves_its_codecs_files(head, tmp_path):
    head.save_assets(tmp_path)
    assert head.codec.saved == tmp_path


def test_the_head_has_no_weights(head):
    assert head.reads == "tokens" and not list(head.parameters())
