"""Programs read back: what XLA compiles here, and lines as its compilers write them."""

import jax
import jax.numpy as jnp
import pytest

from afmrl_jax.planning.hlo import Collective, Reader, read, replica_group, shapes, size

COMPILED_AS_FOR_USERS = True


def total(function, *arguments, **options):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Reader(text, lambda *_: 0.0, lambda _: 0.0, **options).total()


def line(attributes, opcode="all-reduce", type_="f32[8]{0}"):
    """An instruction of one operand with these attributes."""
    text = f"""
%sum (x: f32[], y: f32[]) -> f32[] {{
  ROOT %add = f32[] add(%x, %y)
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = {type_} parameter(0)
  ROOT %one = {type_} {opcode}(%p), channel_id=1, {attributes}
}}
"""
    computations, entry = read(text)
    return text, computations[entry][-1]


X = jax.ShapeDtypeStruct((16, 32), jnp.float32)
W = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32)


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def unrolled(x, w):
    for i in range(w.shape[0]):
        x = jnp.tanh(x @ w[i])
    return x


def test_a_loop_counts_as_often_as_it_runs():
    products = 2 * 16 * 32 * 32 * 6
    assert total(scanned, X, W).flops == total(unrolled, X, W).flops == products


def test_loops_within_loops_and_their_gradients_too():
    def twice(x, w):
        return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=3)[0].sum()

    def written_out(x, w):
        for _ in range(3):
            x = unrolled(x, w)
        return x.sum()

    gradients = [total(jax.grad(f, argnums=(0, 1)), X, W) for f in (twice, written_out)]
    assert gradients[0].flops == gradients[1].flops == 3 * 3 * 2 * 16 * 32 * 32 * 6


def test_a_loop_that_its_data_ends_counts_as_often_as_is_said():
    def halved(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x / 2, x)

    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    found = total(halved, square, default_trip_count=5)
    assert found.unread_loops == 1 and found.flops == 5 * 2 * 32**3


def test_a_convolution_counts_no_products_with_its_padding():
    def convolved(x, k):
        dims = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, k, (1,), [(1, 1)], dimension_numbers=dims)

    text = """
ENTRY %main (x: f32[2,5,3], k: f32[3,3,4]) -> f32[2,5,4] {
  %x = f32[2,5,3]{2,1,0} parameter(0)
  %k = f32[3,3,4]{2,1,0} parameter(1)
  ROOT %y = f32[2,5,4]{2,1,0} convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    by_hand = 2 * 2 * (3 * 5 - 2) * 3 * 4  # of 3 x 5 places, two lie in the padding
    assert Reader(text, lambda *_: 0.0, lambda _: 0.0).total().flops == by_hand
    x, k = jnp.zeros((2, 5, 3)), jnp.zeros((3, 3, 4))
    counted = jax.jit(convolved).lower(x, k).cost_analysis()["flops"]
    assert counted == by_hand


def test_what_is_cut_out_of_a_stack_is_read_once_a_turn_and_not_the_stack():
    found = total(scanned, X, W)
    stack = 6 * 32 * 32 * 4
    # Each matrix is read, written where it was cut to, and read by the product; activations go in
    # and out of product and tanh. The whole stack at each turn would be six of it.
    assert stack < found.bytes < 3 * stack + 6 * 5 * 16 * 32 * 4


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2], device_ids=([2,8]T(1,0)) {'a'}", tuple(range(8))),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}", tuple(range(0, 16, 2))),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
    ],
)
def test_groups_are_read_however_they_are_written(attributes, group):
    assert replica_group(line(attributes)[1]) == group


def test_a_permutation_s_group_is_its_ring():
    attributes = "source_target_pairs={{0,1},{1,3},{3,0},{2,4},{4,2}}"
    assert replica_group(line(attributes, "collective-permute")[1]) == (0, 1, 3)


@pytest.mark.parametrize(
    "opcode, received", [("all-reduce", 48), ("reduce-scatter", 24), ("all-gather", 96)]
)
def test_an_exchange_s_bytes_are_what_a_device_must_receive(opcode, received):
    text, _ = line("replica_groups={{0,1,2,3}}, to_apply=%sum", opcode)
    found = Reader(text, lambda *_: 0.0, lambda one: one.size).total()
    assert found.collectives == {Collective(opcode, (0, 1, 2, 3), received, False): 1}
    assert found.seconds == received  # nothing overlaps it


def test_an_exchange_between_slices_goes_by_the_hosts():
    text = """
ENTRY %main (x: bf16[256,8]) -> token[] {
  %x = bf16[256,8]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (bf16[256,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %done = token[] send-done(%send), channel_id=2
}
""".replace("\\\n", "")
    found = Reader(text, lambda *_: 0.0, lambda one: one.size).total()
    assert found.collectives == {Collective("all-reduce", (0, 4), 256 * 8 * 2, False): 1}


def test_types_are_read_with_where_they_lie():
    type_ = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[4]{0}, pred[])"
    assert shapes(type_) == [("bf16", (2, 3), False), ("f32", (4,), True), ("pred", (), True)]
    assert size(type_) == 12 + 16 + 1 and size(type_, large=True) == 17


LOOP = """
%begun (a: bf16[4,64]) -> (bf16[4,64], bf16[4,256]) {
  %a = bf16[4,64]{1,0} parameter(0)
  %gather = bf16[4,256]{1,0} all-gather(%a), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %both = (bf16[4,64]{1,0}, bf16[4,256]{1,0}) tuple(%a, %gather)
}

%given (g: f32[6,8,128]) -> f32[6,8,128] {
  %g = f32[6,8,128]{2,1,0} parameter(0)
  ROOT %same = f32[6,8,128]{2,1,0} copy(%g)
}

%async_collective_fusion.1 (x: f32[6,8,128], i: s32[], a: bf16[4,64], b: bf16[4,256]) -> \
(f32[8,128], bf16[4,64], bf16[4,256]) {
  %x = f32[6,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = bf16[4,64]{1,0} parameter(2)
  %b = bf16[4,256]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %stack = f32[6,8,128]{2,1,0} fusion(%x), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%given
  %row = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0} bitcast(%row)
  %gather = bf16[4,256]{1,0} all-gather(%a), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %all = (f32[8,128]{1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) tuple(%flat, %a, %gather)
}

%turn (c: (s32[], f32[6,8,128], bf16[4,64], bf16[4,256])) -> (s32[], f32[6,8,128], bf16[4,64], \
bf16[4,256]) {
  %c = (s32[], f32[6,8,128]{2,1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[6,8,128]{2,1,0} get-tuple-element(%c), index=1
  %a = bf16[4,64]{1,0} get-tuple-element(%c), index=2
  %b = bf16[4,256]{1,0} get-tuple-element(%c), index=3
  %piece = (f32[8,128]{1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) fusion(%x, %i, %a, %b), \
kind=kLoop, calls=%async_collective_fusion.1
  %b2 = bf16[4,256]{1,0} get-tuple-element(%piece), index=2
  ROOT %next = (s32[], f32[6,8,128]{2,1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) \
tuple(%i, %x, %a, %b2)
}

%test (c: (s32[], f32[6,8,128], bf16[4,64], bf16[4,256])) -> pred[] {
  %c = (s32[], f32[6,8,128]{2,1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[6,8,128], a: bf16[4,64]) -> bf16[4,256] {
  %x = f32[6,8,128]{2,1,0} parameter(0)
  %a = bf16[4,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %async-collective-start.1 = (bf16[4,64]{1,0}, bf16[4,256]{1,0}) fusion(%a), \
kind=kCustom, calls=%begun
  %b = bf16[4,256]{1,0} get-tuple-element(%async-collective-start.1), index=1
  %given.1 = (s32[], f32[6,8,128]{2,1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) \
tuple(%zero, %x, %a, %b)
  %loop = (s32[], f32[6,8,128]{2,1,0}, bf16[4,64]{1,0}, bf16[4,256]{1,0}) while(%given.1), \
condition=%test, body=%turn, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = bf16[4,256]{1,0} get-tuple-element(%loop), index=3
}
""".replace("\\\n", "")


def test_an_exchange_that_a_loop_carries_on_counts_once_and_moves_nothing_itself():
    found = Reader(LOOP, lambda *_: 0.0, lambda one: one.size).total()
    received = 3 * 4 * 64 * 2
    assert found.collectives == {Collective("all-gather", (0, 1, 2, 3), received, True): 1}
    assert found.seconds == received
    # Each turn reads its number and cuts one row out of the stack, which a fusion within the fusion
    # gives on, and writes it.
    assert found.bytes == 6 * (4 + 2 * 8 * 128 * 4)


@pytest.mark.parametrize("space, moved", [("", 2), ("S(1)", 1)])
def test_a_copy_to_the_chip_s_own_memory_is_read_only(space, moved):
    text = f"""
ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %begun = (f32[8,128]{{1,0:T(8,128){space}}}, f32[8,128]{{1,0}}, u32[]{{:S(2)}}) copy-start(%x)
  ROOT %done = f32[8,128]{{1,0:T(8,128){space}}} copy-done(%begun)
}}
"""
    found = Reader(text, lambda *_: 0.0, lambda _: 0.0).total()
    assert found.bytes == moved * 8 * 128 * 4
