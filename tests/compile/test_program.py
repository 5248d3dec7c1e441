"""What is read from a compiled program, against programs of a few lines, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.compile.program import Collective, phase_of, read_program
from tests.support.toys import mesh_of

MESH = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}


def program(line, phase="exchange"):
  """An entry that runs a loop of three trips, in whose body the line stands."""
  name = f'metadata={{op_name="jit(step)/while/body/moe/{phase}/x"}}'
  return f"""HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %p = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %x = bf16[8,16]{{1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=1
  {line}, {name}
}}

%condition (p: (s32[], bf16[8,16])) -> pred[] {{
  %p.1 = (s32[], bf16[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {{
  %x.1 = bf16[8,16] parameter(0)
  %loop = (s32[], bf16[8,16]) while(%t), condition=%condition, body=%body
  ROOT %y = bf16[8,16] get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("expert",)),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("[2,4]<=[8]", ("expert",)),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[1,8]<=[8]", ("data", "expert")),
    ("mesh['data'=2,'fsdp'=1,'expert'=4,'tensor'=1] {'expert'}", ("expert",)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
  ],
)
def test_axes_of_every_spelling_of_groups(groups, axes):
  line = f"%g = bf16[8,16]{{1,0}} all-to-all(%x), channel_id=1, replica_groups={groups}"
  found = read_program(program(line), MESH).collectives
  assert found == [Collective("all-to-all", axes, "exchange", 8 * 16 * 2, 3)]


@pytest.mark.parametrize(
  ("line", "kind", "size"),
  [
    ("bf16[32,16]{1,0} all-gather(%x)", "all-gather", 32 * 16 * 2),
    # Of a start, the result alone; its done is no other collective.
    ("(bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x)", "all-gather", 32 * 16 * 2),
    ("f32[2,16]{1,0} reduce-scatter(%x)", "reduce-scatter", 4 * 2 * 16 * 4),
    ("f32[8,16]{1,0} all-reduce-start(%x), to_apply=%add", "all-reduce", 8 * 16 * 4),
    # Two arrays in one message.
    ("(f32[8], bf16[4]) all-reduce(%x, %x), to_apply=%add", "all-reduce", 8 * 4 + 4 * 2),
    ("pred[8]{0:T(1024)} all-to-all(%x)", "all-to-all", 8),
    ("f8e4m3fn[8] all-to-all(%x)", "all-to-all", 8),
  ],
)
def test_bytes_of_a_collective(line, kind, size):
  hlo = program(f"%g = {line}, replica_groups=[2,4]<=[8]")
  assert read_program(hlo, MESH).collectives == [Collective(kind, ("expert",), "exchange", size, 3)]


def test_a_scatter_over_a_part_of_an_axis_takes_what_its_group_returns():
  line = "%g = f32[2,16]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], to_apply=%add"
  (one,) = read_program(program(line), MESH).collectives
  assert (one.axes, one.size) == (("expert",), 2 * 2 * 16 * 4)


@pytest.mark.parametrize(
  "branches",
  ["true_computation=%rare, false_computation=%usual", "branch_computations={%usual, %rare}"],
)
def test_of_a_conditional_the_false_branch_counts(branches):
  branch = """%{} (p: bf16[8,16]) -> bf16[8,16] {{
  %p.{} = bf16[8,16] parameter(0)
  ROOT %r.{} = bf16[{}] {}(%p.{}), replica_groups=[2,4]<=[8]
}}

"""
  text = branch.format("usual", 3, 3, "8,16", "all-to-all", 3)
  text += branch.format("rare", 4, 4, "32,16", "all-gather", 4)
  hlo = program(f"%g = bf16[8,16] conditional(%flag, %x, %x), {branches}")
  found = read_program(hlo.replace("%body (", text + "%body ("), MESH).collectives
  assert [(one.kind, one.times) for one in found] == [("all-to-all", 3)]


def test_a_reduce_scatter_in_a_fusion_counts():
  fused = """%all-reduce-scatter.1 (p: bf16[8,16]) -> bf16[2,16] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %r = bf16[2,16]{1,0} reduce-scatter(%p.2), replica_groups=[2,4]<=[8], to_apply=%add
}

"""
  line = "%g = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
  hlo = program(line).replace("%body (", fused + "%body (")
  (one,) = read_program(hlo, MESH).collectives
  assert (one.kind, one.size, one.times) == ("reduce-scatter", 8 * 16 * 2, 3)


def test_cycles_by_phase_without_those_that_are_unknown():
  estimate = 'backend_config={"window_config":{"estimated_cycles":"%s"}}'
  known = program(f"%g = bf16[8,16] fusion(%x), calls=%add, {estimate % 70}", "experts")
  assert read_program(known, MESH).cycles == {"experts": 210}
  unknown = program(f"%g = bf16[8,16] fusion(%x), calls=%add, {estimate % 9223372036854775807}")
  assert read_program(unknown, MESH).cycles == {}


def test_a_kernel_whose_text_has_lines_and_braces_does_not_end_its_computation():
  """A Pallas kernel's metadata is a whole program, with lines of its own."""
  kernel = '%k = bf16[8,16] custom-call(%x), custom_call_target="tpu_custom_call", text="f {\n}\n}"'
  line = kernel + "\n  %g = bf16[8,16]{1,0} all-to-all(%k), replica_groups=[2,4]<=[8]"
  found = read_program(program(line), MESH)
  assert [(c.kind, c.times) for c in found.collectives] == [("all-to-all", 3)]
  assert found.custom_calls == {"tpu_custom_call": 3}


def test_memory_counts_slices_for_what_they_read_and_nothing_in_vmem():
  size = 8 * 16 * 2
  plain = program("%g = bf16[8,16]{1,0} add(%x, %x)")
  assert read_program(plain, MESH).memory_bytes == 3 * 3 * size
  near = program("%g = bf16[8,16]{1,0:T(8,128)S(1)} add(%x, %x)")
  assert read_program(near, MESH).memory_bytes == 3 * 2 * size
  slices = """%fused (p: bf16[8,16]) -> bf16[1,16] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  %i.2 = s32[] constant(0)
  ROOT %d = bf16[1,16]{1,0} dynamic-slice(%p.2, %i.2, %i.2), dynamic_slice_sizes={1,16}
}

"""
  hlo = program("%g = bf16[1,16]{1,0} fusion(%x), kind=kLoop, calls=%fused")
  read = read_program(hlo.replace("%body (", slices + "%body ("), MESH)
  assert read.memory_bytes == 3 * 2 * 16 * 2


def test_the_innermost_phase_is_the_one_that_counts():
  assert phase_of("jit(step)/transpose(jvp(attention))/linear/dot") == "attention"
  assert phase_of("moe/route/vmap(dispatch)/sort") == "dispatch"
  assert phase_of("jit(step)/mul") == ""


def test_a_real_program_of_this_machine_reads_the_same():
  """XLA's own text: a scan of five gathers over `expert` and a sum over all devices."""
  mesh = mesh_of(data=2, expert=4)
  P = jax.sharding.PartitionSpec

  def on_device(x_ZN):
    def body(total, x_N):
      with jax.named_scope("exchange"):
        return total + jax.lax.all_gather(x_N, "expert", tiled=True).sum(), None

    return jax.lax.psum(jax.lax.scan(body, jnp.zeros(()), x_ZN)[0], sharding.BATCH_AXES)

  def total(x_ZN):
    spec = P(None, ("data", "expert"))
    return jax.shard_map(on_device, in_specs=spec, out_specs=P(), check_vma=False)(x_ZN)

  with jax.set_mesh(mesh):
    hlo = jax.jit(total).lower(np.zeros((5, 1024), np.float32)).compile().as_text()
  found = {tuple(one) for one in read_program(hlo, dict(mesh.shape)).collectives}
  assert ("all-gather", ("expert",), "exchange", 4 * 128 * 4, 5) in found
  assert ("all-reduce", ("data", "expert"), "", 4, 1) in found
