"""Everyone who applies the same commits holds the same bytes, and can prove it."""

import hashlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapter import Adapter, coefficients, term
from shared.codec import encode_manifest
from shared.errors import MalformedMessage
from shared.messages import Block, Commit, Manifest, Variant


def a_manifest(*, momentum: bool = False, scale: int = 0, d: int = 100) -> bytes:
    return encode_manifest(
        Manifest(
            epoch=0,
            architecture="llama",
            seed=7,
            blocks=[
                Block("control", "l_out-0", [d - 40]),
                Block("control", "l_out-1", [40], scale=scale, layer=1),
            ],
            variants=[Variant("a" * 64, 1, "tiny.gguf")],
            d=d,
            update_rule="momentum" if momentum else "plain",
        )
    )


def a_commit(seed: int, momentum: int = 0, size: int = 2**12) -> Commit:
    values = (np.arange(16) * 7919 + seed * 104729) * 613 % (2 * size) - size
    return Commit(momentum, [term(seed, (0, 2), [(0, 16)], values)])


def test_the_digest_is_what_the_design_says() -> None:
    data = a_manifest(momentum=True)
    adapter = Adapter(data)
    adapter.apply(3, a_commit(1, momentum=230))
    assert adapter.velocity is not None
    by_hand = hashlib.sha256(
        b"seedwire1"
        + hashlib.sha256(data).digest()
        + (0).to_bytes(4, "little")
        + (3).to_bytes(4, "little")
        + adapter.theta.astype("<i4").tobytes()
        + adapter.velocity.astype("<i8").tobytes()
    )
    assert adapter.digest() == by_hand.hexdigest()


def test_the_golden_digest_after_two_commits() -> None:
    adapter = Adapter(a_manifest(momentum=True, scale=1))
    adapter.apply(1, a_commit(1, momentum=230))
    adapter.apply(2, a_commit(2, momentum=230))
    assert adapter.theta[:3].tolist() == [-3555, 49917, 12591]
    assert adapter.digest()[:16] == "331c6fbefcb49435"


def test_a_scale_exponent_doubles_its_blocks_steps() -> None:
    plain, scaled = Adapter(a_manifest()), Adapter(a_manifest(scale=1))
    plain.apply(1, a_commit(1))
    scaled.apply(1, a_commit(1))
    assert (scaled.theta[:60] == plain.theta[:60]).all()
    assert (scaled.theta[60:] == 2 * plain.theta[60:]).all()


@given(seeds=st.lists(st.integers(0, 9), max_size=5), momentum=st.booleans())
def test_a_snapshot_goes_on_as_its_original(seeds: list[int], momentum: bool) -> None:
    data = a_manifest(momentum=momentum)
    original = Adapter(data)
    for number, seed in enumerate(seeds):
        original.apply(number + 1, a_commit(seed, momentum=200 if momentum else 0))
    restored = Adapter.from_bytes(data, original.to_bytes())
    assert restored.digest() == original.digest()
    original.apply(9, a_commit(3))
    restored.apply(9, a_commit(3))
    assert restored.digest() == original.digest()


def test_after_leaves_the_original_alone() -> None:
    adapter = Adapter(a_manifest(momentum=True))
    before = adapter.digest()
    assert adapter.after(1, a_commit(1)).digest() != before
    assert adapter.digest() == before


def test_a_commit_that_would_leave_int32_is_scaled_down_not_saturated() -> None:
    adapter = Adapter(a_manifest(momentum=True, scale=12))
    commit = a_commit(1, momentum=255, size=2**22)
    while True:  # walk until the next such step would leave int32
        try:
            adapter.apply(adapter.round + 1, commit)
        except OverflowError:
            break
    fitting = adapter.fitting(commit)
    old, new = coefficients(commit.terms[0]), coefficients(fitting.terms[0])
    assert (np.abs(new) <= np.abs(old) / 2 + 1).all()
    assert fitting.momentum == 0
    adapter.apply(adapter.round + 1, fitting)


def test_a_manifest_whose_parts_do_not_fit_is_refused_by_name() -> None:
    manifest = msgspec.msgpack.decode(a_manifest(), type=Manifest)
    wrong = msgspec.structs.replace(manifest, d=99)
    with pytest.raises(MalformedMessage, match="d = 99, its blocks 100"):
        Adapter(encode_manifest(wrong))
    rows = msgspec.structs.replace(manifest, blocks=[Block("output_rows", "output.weight", [100])])
    with pytest.raises(MalformedMessage, match=r"block 0 \(output_rows of output.weight\)"):
        Adapter(encode_manifest(rows))
    b = Block("lora_b", "m", [70], d_in=30)
    prompt = Block("prompt", "token_embd.weight", [5, 20], rows=[1, 2, 3, 4, 5])
    for blocks, why in (
        ([prompt], "nothing else, has a unit"),
        ([msgspec.structs.replace(prompt, rows=[1], unit=1.0)], r"must be \[rows, n_embd\]"),
        ([Block("control", "", [100], layer=1, unit=1.0)], "nothing else, has a unit"),
        ([b, Block("lora_a", "m", [30], slot=1)], r"block 1 \(lora_a of m\): no lora_b of slot 1"),
        ([b, Block("lora_a", "m", [31])], "no lora_b of slot 0 has such an A"),
    ):
        with pytest.raises(MalformedMessage, match=why):
            Adapter(encode_manifest(msgspec.structs.replace(manifest, blocks=blocks)))


def test_a_snapshot_of_another_manifest_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="another manifest"):
        Adapter.from_bytes(a_manifest(d=120), Adapter(a_manifest()).to_bytes())
