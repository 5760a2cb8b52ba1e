"""GPUs by name: the names that people and drivers use, and what an unknown name says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.training.memory_plan.cards import CARDS


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 4090", "RTX 4090 24GB"),
        ("4090", "RTX 4090 24GB"),
        ("rtx-3090 24gb", "RTX 3090 24GB"),
        ("4060 Ti", "RTX 4060 Ti 16GB"),
        ("A100 40GB", "A100 40GB"),
        ("A10", "A10 24GB"),
        # as torch.cuda.get_device_name says them
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti 11GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 96GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 96GB"),
        ("Tesla T4", "T4 16GB"),
    ],
)
def test_names(name, card):
    assert lk.find_card(name).name == card


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RTX 4900", "did you mean 'RTX 4090 24GB'"),
        ("potato", "say its memory instead, as in 24GB"),
        ("AMD Instinct MI300X", "is not in lorakit's table"),
        ("", "is not in lorakit's table; say"),
        ("a100", "the table has A100 40GB or A100 80GB"),
        ("4060 Ti 8GB", "the table has RTX 4060 Ti 16GB"),
        ("V100", "its kernels need compute capability 7.5"),
        ("Tesla V100-SXM2-32GB", "its kernels need compute capability 7.5"),
    ],
)
def test_a_name_that_means_no_card_is_one_sentence(name, said):
    with pytest.raises(lk.LorakitError) as caught:
        lk.find_card(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_a_card_or_one_error(name):
    try:
        assert lk.find_card(name) in CARDS
    except lk.LorakitError as error:
        assert str(error)


@pytest.mark.parametrize("card", CARDS, ids=[card.name for card in CARDS])
def test_what_cuda_sees_is_a_little_less_than_what_is_printed_on_the_box(card):
    """The driver and error correction take 0 to 8 % of GiB; a wrong digit would be further off."""
    printed = int(card.name.split()[-1].removesuffix("GB"))
    assert 0.91 < card.memory / (printed << 30) <= 1
    assert card.usable == card.memory - card.context
    assert card.capability >= (7, 5)
    assert lk.find_card(card.name) is card
