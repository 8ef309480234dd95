"""The shared-memory backend with real processes: same bits as a plain computation, and no way to hang.

A launch costs seconds of imports, so each one holds many checks; the functions named `ranks_*` run in the
workers. Expected values are computed in every worker from all ranks' inputs, in rank order.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from whalepod.parallel import processes, shm
from whalepod.parallel.shm import backend, build

Op = dist.ReduceOp
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]
LARGE = 600_011  # elements: several chunks in every type, and odd


def start(
    rank: int, num: int, store: Path, work: Callable[..., None], args: tuple[Any, ...], destroys: bool = True
) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group(
        shm.register(),
        init_method=f"file://{store}",
        rank=rank,
        world_size=num,
        timeout=timedelta(seconds=60),
    )
    work(rank, num, *args)
    (store.parent / f"finished{rank}").touch()
    if destroys:
        dist.destroy_process_group()


def launch(num: int, folder: Path, work: Callable[..., None], *args: Any, destroys: bool = True) -> int:
    """Runs `work(rank, num, *args)` in `num` processes and raises the first error. Returns how many ranks
    came to the end of it."""
    processes.context()
    arguments = (num, folder / "store", work, args, destroys)
    mp.start_processes(start, arguments, nprocs=num, start_method=processes.START_METHOD)
    return len(list(folder.glob("finished*")))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        build.load()
    except build.Unavailable as problem:
        pytest.skip(str(problem))


# What every rank holds, and what the collectives must make of it.


def inputs(num: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    if dtype.is_floating_point:
        return [torch.randn(size, generator=generator).to(dtype) for _ in range(num)]
    return [
        torch.randint(0, 2 if dtype == torch.bool else 100, (size,), generator=generator).to(dtype)
        for _ in range(num)
    ]


def combined(xs: list[Tensor], op: Any) -> Tensor:
    """In rank order, 16-bit floats in fp32 and rounded once."""
    dtype = xs[0].dtype
    wide = [x.float() if dtype in (torch.bfloat16, torch.float16) else x for x in xs]
    if dtype == torch.bool:
        return reduce(torch.logical_or if op in (Op.SUM, Op.MAX) else torch.logical_and, wide)
    if op == Op.SUM:
        return reduce(torch.add, wide).to(dtype)
    if op == Op.AVG:
        total = reduce(torch.add, wide)
        return (total / len(xs) if dtype.is_floating_point else total // len(xs)).to(dtype)
    return reduce({Op.MAX: torch.maximum, Op.MIN: torch.minimum, Op.PRODUCT: torch.mul}[op], wide).to(dtype)


def check_reductions(rank: int, num: int) -> None:
    for dtype in [*FLOATS, *INTEGERS, torch.bool]:
        ops = [Op.SUM, Op.MAX, Op.MIN, Op.PRODUCT] + ([] if dtype == torch.bool else [Op.AVG])
        sizes = [0, 1, 7, 20_001, LARGE] if dtype in (torch.float32, torch.bfloat16) else [1, 10_001]
        for size in sizes:
            for op in ops if size < LARGE else [Op.SUM]:
                xs = inputs(num, size, dtype)
                x = xs[rank].clone()
                dist.all_reduce(x, op)
                assert torch.equal(x, combined(xs, op)), (dtype, size, op)
                root = size % num
                x = xs[rank].clone()
                dist.reduce(x, root, op)
                assert torch.equal(x, combined(xs, op) if rank == root else xs[rank])
                xs = inputs(num, size * num, dtype)
                part = torch.empty(size, dtype=dtype)
                expected = combined(xs, op)[rank * size :][:size]
                dist.reduce_scatter_tensor(part, xs[rank], op)
                assert torch.equal(part, expected), (dtype, size, op)
                dist.reduce_scatter(part.zero_(), list(xs[rank].split(size) if size else [part] * num), op)
                assert torch.equal(part, expected)
    x = torch.tensor([float("nan"), 1.0, -1.0]) if rank == 1 else torch.zeros(3)
    dist.all_reduce(x, Op.MAX)
    assert x.isnan().tolist() == [True, False, False]
    x = torch.full((5,), 3.0)
    dist.all_reduce(x, dist._make_nccl_premul_sum(0.5))
    assert torch.equal(x, torch.full((5,), 1.5 * num))


def check_movement(rank: int, num: int) -> None:
    for dtype in [
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.complex64,
    ]:
        for size in [0, 1, 7, 20_001, LARGE] if dtype in (torch.float32, torch.bool) else [1, 10_001]:
            xs = [x.to(dtype) for x in inputs(num, size, torch.uint8)]
            bits = torch.uint8  # torch.equal does not know float8

            def same(a: Tensor, b: Tensor, bits: torch.dtype = bits) -> bool:
                return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))

            def empty(n: int = size, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(n, dtype=dtype)

            root = size % num
            x = xs[rank].clone()
            dist.broadcast(x, root)
            assert same(x, xs[root])
            out = empty(size * num)
            dist.all_gather_into_tensor(out, xs[rank])
            assert same(out, torch.cat(xs))
            outs = [empty() for _ in range(num)]
            dist.all_gather(outs, xs[rank])
            assert all(map(same, outs, xs))
            outs = [empty() for _ in range(num)]
            dist.gather(xs[rank], outs if rank == root else None, root)
            assert rank != root or all(map(same, outs, xs))
            x = empty()
            dist.scatter(x, xs if rank == root else None, root)
            assert same(x, xs[rank])
            out = empty(size * num)
            dist.all_to_all_single(out, torch.cat([x.roll(rank) for x in xs]))
            assert same(out, torch.cat([xs[rank].roll(r) for r in range(num)]))
    # Uneven: rank r sends (r + d) rows to d, none at all to itself when r is 0.
    for scale in (1, 50_000):
        rows = [[(r + d) * scale for d in range(num)] for r in range(num)]
        sent = [torch.arange(sum(rows[r]) * 3, dtype=torch.float32).view(-1, 3) + r for r in range(num)]
        taken = [rows[r][rank] for r in range(num)]
        out = torch.zeros(sum(taken), 3)
        dist.all_to_all_single(out, sent[rank], taken, rows[rank])
        assert torch.equal(out, torch.cat([sent[r].split(rows[r])[rank] for r in range(num)]))
        outs = [torch.zeros(n, 3) for n in taken]
        dist.all_to_all(outs, list(sent[rank].split(rows[rank])))
        assert torch.equal(torch.cat(outs), out)
    # Strided tensors go by way of a copy.
    x = torch.arange(12.0).view(3, 4).t() * (rank + 1)
    dist.all_reduce(x)
    assert torch.equal(x, torch.arange(12.0).view(3, 4).t() * sum(range(1, num + 1)))
    box = [None] * num
    dist.all_gather_object(box, {"rank": rank})
    assert [each["rank"] for each in box if each] == list(range(num))


def check_async(rank: int, num: int) -> None:
    """Calls return before peers arrive, end in the order of their calls, and do not hold each other up."""
    xs = inputs(num, LARGE, torch.float32)
    if rank == 0:
        x = xs[0].clone()
        begun = time.monotonic()
        first = dist.all_reduce(x, async_op=True)
        second = dist.all_gather_into_tensor(torch.empty(num), torch.zeros(1), async_op=True)
        assert time.monotonic() - begun < 0.25
        time.sleep(0.05)
        assert not first.is_completed()  # the others come half a second later
        assert not second.is_completed()
        second.wait()
        assert first.is_completed()
        assert torch.equal(first.get_future().value()[0], combined(xs, Op.SUM))
    else:
        time.sleep(0.5)
        dist.all_reduce(xs[rank])
        dist.all_gather_into_tensor(torch.empty(num), torch.zeros(1))
    # A collective that moves while its caller does something else.
    work = dist.all_reduce(torch.ones(LARGE), async_op=True)
    deadline = time.monotonic() + 20
    while not work.is_completed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Two groups at once, called in opposite orders by two ranks.
    a, b = dist.new_group(), dist.new_group()
    assert shm.carries(a)
    one, two = torch.ones(9), torch.ones(9)
    calls = [(one, a), (two, b)]
    works = [dist.all_reduce(x, group=g, async_op=True) for x, g in (calls if rank else calls[::-1])]
    for work in works:
        work.wait()
    assert torch.equal(one, torch.full((9,), float(num)))
    assert torch.equal(two, one)
    dist.destroy_process_group(a)
    # Coalesced and functional forms.
    xs = inputs(num, 1001, torch.bfloat16)
    tensors = [xs[rank].clone(), xs[rank].clone() * 2]
    with dist._coalescing_manager():
        for x in tensors:
            dist.all_reduce(x)
    assert torch.equal(tensors[0], combined(xs, Op.SUM))
    outs, parts = (
        [torch.empty(1001 * num).bfloat16() for _ in range(2)],
        [torch.empty(1001).bfloat16() for _ in range(2)],
    )
    with dist._coalescing_manager():
        for out in outs:
            dist.all_gather_into_tensor(out, xs[rank])
    assert torch.equal(outs[1], torch.cat(xs))
    with dist._coalescing_manager(async_ops=True) as manager:
        for part in parts:
            dist.reduce_scatter_tensor(part, outs[0])
    manager.wait()
    assert torch.equal(parts[1], combined([xs[rank]] * num, Op.SUM))
    group = dist.group.WORLD
    assert torch.equal(funcol.all_reduce(xs[rank], "sum", group), combined(xs, Op.SUM))
    assert torch.equal(funcol.all_gather_tensor(xs[rank], 0, group), torch.cat(xs))
    gathered = funcol.all_gather_into_tensor_coalesced([xs[rank], xs[rank] + 1], group)
    assert torch.equal(gathered[0], torch.cat(xs))
    whole = inputs(num, 8 * num, torch.float32)
    expected = combined(whole, Op.SUM)[rank * 8 :][:8]
    assert torch.equal(funcol.reduce_scatter_tensor(whole[rank], "sum", 0, group), expected)
    pieces = funcol.reduce_scatter_tensor_coalesced([whole[rank], whole[rank]], "sum", [0, 0], group)
    assert torch.equal(pieces[1], expected)


def check_pipes(rank: int, num: int) -> None:
    to, source = (rank + 1) % num, (rank - 1) % num
    for size in (0, 1, 7, LARGE):
        xs, y = inputs(num, size, torch.float32), torch.zeros(size)
        ops = [dist.P2POp(dist.isend, xs[rank], to), dist.P2POp(dist.irecv, y, source)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert torch.equal(y, xs[source])
    # All send several MiB before anyone receives; then tags in another order than they were sent.
    sends = [dist.isend(torch.full((LARGE,), float(rank + 10 * tag)), to, tag=tag) for tag in (1, 2, 3)]
    for tag in (3, 1, 2):
        y = torch.zeros(LARGE)
        dist.recv(y, source, tag=tag)
        assert torch.equal(y, torch.full((LARGE,), float(source + 10 * tag)))
    for work in sends:
        work.wait()
    # A receive that is posted before a collective, and met by a send after it.
    y = torch.zeros(5)
    receive = dist.irecv(y, source)
    dist.barrier()
    dist.send(torch.full((5,), float(rank)), to)
    receive.wait()
    assert torch.equal(y, torch.full((5,), float(source)))
    if rank == 0:
        seen = set()
        for _ in range(num - 1):
            y = torch.zeros(1)
            seen.add(dist.recv(y))
            assert y.item() in seen
        assert seen == set(range(1, num))
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    # A message of another size than expected is an error, not silence, and the pipe goes on.
    if rank == 0:
        dist.send(torch.zeros(3), 1)
        dist.send(torch.ones(2), 1)
    elif rank == 1:
        with pytest.raises(RuntimeError, match="sent 12 bytes, rank 1 expected 8"):
            dist.recv(torch.zeros(2), 0)
        y = torch.zeros(2)
        dist.recv(y, 0)
        assert torch.equal(y, torch.ones(2))


def ranks_two(rank: int, num: int) -> None:
    assert dist.get_backend() == "whale"
    assert shm.carries()
    for check in (check_reductions, check_movement, check_async, check_pipes):
        check(rank, num)
    # gloo behind it: an all-reduce of bits of truth values is none of ours, nor is a sparse one.
    sparse = torch.eye(3).to_sparse()
    dist.all_reduce(sparse)
    assert torch.equal(sparse.to_dense(), torch.eye(3) * num)


def test_two_ranks(tmp_path: Path) -> None:
    assert launch(2, tmp_path, ranks_two) == 2


# torch's own building blocks on it.


def check_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, members in (("tp", (rank // 2 * 2, rank // 2 * 2 + 1)), ("dp", (rank % 2, rank % 2 + 2))):
        group = mesh.get_group(name)
        assert shm.carries(group)
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=group)
        assert x.item() == sum(members)
    alone = dist.new_group([1, 3], use_local_synchronization=True) if rank % 2 else None
    if alone is not None:
        x = torch.ones(1)
        dist.all_reduce(x, group=alone)
        assert x.item() == 2
    whole = torch.arange(64.0).view(8, 8)
    sharded = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    assert torch.equal(sharded.redistribute(mesh, [Replicate(), Replicate()]).to_local(), whole)
    turned = sharded.redistribute(mesh, [Shard(1), Shard(0)])
    assert torch.equal(turned.full_tensor(), whole)
    product = sharded @ distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
    assert torch.equal(product.full_tensor(), whole @ whole)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def check_fsdp(rank: int, num: int, folder: Path) -> None:
    plain, sharded = model(), model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    data = torch.randn(num, 4, 16, generator=torch.Generator().manual_seed(1))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, sharded)]
    for _ in range(3):
        plain(data).square().mean().backward()
        sharded(data[rank]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert isinstance(s, DTensor)
        torch.testing.assert_close(s.full_tensor(), p, rtol=1e-5, atol=1e-6)
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=folder / "dcp")
    saved = {name: value.full_tensor().clone() for name, value in sharded.state_dict().items()}
    with torch.no_grad():
        for s in sharded.parameters():
            s.zero_()
    state = {"model": sharded.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    for name, value in state["model"].items():
        assert torch.equal(value.full_tensor(), saved[name])


def check_pipeline(rank: int, num: int) -> None:
    layers = [nn.Linear(64, 64) for _ in range(num)]
    torch.manual_seed(0)
    for layer in layers:
        layer.reset_parameters()
    whole = nn.Sequential(*layers)
    x, target = torch.randn(16, 64), torch.randn(16, 64)
    stage = PipelineStage(nn.Sequential(nn.Linear(64, 64)), rank, num, torch.device("cpu"))
    stage.submod.load_state_dict({f"0.{k}": v for k, v in layers[rank].state_dict().items()})
    schedule = Schedule1F1B(stage, 8, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
    elif rank == num - 1:
        losses: list[Tensor] = []
        schedule.step(target=target, losses=losses)
        torch.testing.assert_close(torch.stack(losses).mean(), nn.functional.mse_loss(whole(x), target))
    else:
        schedule.step()
    nn.functional.mse_loss(whole(x), target).backward()
    torch.testing.assert_close(stage.submod[0].weight.grad, layers[rank].weight.grad)


def ranks_four(rank: int, num: int, folder: Path) -> None:
    assert shm.carries()
    check_reductions(rank, num)
    check_movement(rank, num)
    check_pipes(rank, num)
    check_mesh(rank)
    check_fsdp(rank, num, folder)
    check_pipeline(rank, num)


def test_four_ranks(tmp_path: Path) -> None:
    assert launch(4, tmp_path, ranks_four, tmp_path) == 4


def ranks_many(rank: int, num: int) -> None:
    xs = inputs(num, LARGE, torch.float32)
    for _ in range(2):
        x = xs[rank].clone()
        dist.all_reduce(x)
        assert torch.equal(x, combined(xs, Op.SUM))
        out = torch.empty(LARGE * num)
        dist.all_gather_into_tensor(out, xs[rank])
        assert torch.equal(out, torch.cat(xs))
    for i in range(100):
        x = torch.tensor([float(rank + i)])
        dist.all_reduce(x)
        assert x.item() == sum(range(num)) + num * i
    check_pipes(rank, num)


def test_eight_ranks_on_few_cores(tmp_path: Path) -> None:
    # Programs that destroy no group must end all the same.
    assert launch(8, tmp_path, ranks_many, destroys=False) == 8


# What goes wrong, or is not for shared memory.


def check_two_hosts(rank: int) -> None:
    host, real = f"host{rank // 2}", backend.host_identity
    backend.host_identity = lambda: host
    world = dist.new_group()
    assert not shm.carries(world)
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=world)
    assert x.item() == 6
    box = [f"from {rank}"]
    dist.broadcast_object_list(box, 3, world)
    assert box == ["from 3"]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    assert shm.carries(mesh.get_group("inside"))
    assert not shm.carries(mesh.get_group("across"))
    for name, expected in (("inside", rank // 2 * 4 + 1), ("across", rank % 2 * 2 + 2)):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=mesh.get_group(name))
        assert x.item() == expected
    # One rank that cannot have the native part takes its group to gloo.
    backend.host_identity = real
    plugins = dist.Backend._plugins
    plugin, plugins["WHALE"] = (
        plugins["WHALE"],
        dist.Backend._BackendPlugin(
            lambda options, _: backend.create(None if rank == 1 else build.load(), options), True
        ),
    )
    mixed = dist.new_group([0, 1])
    plugins["WHALE"] = plugin
    if rank < 2:
        assert not shm.carries(mixed)
        dist.barrier(mixed)


def ranks_failing(rank: int, num: int, folder: Path) -> None:
    check_two_hosts(rank)
    hasty = dist.new_group(timeout=timedelta(seconds=1))
    pair = dist.new_group()
    if rank == 0:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="timed out: rank 0 waited for rank 1 in all_reduce"):
            dist.all_reduce(torch.ones(1), group=hasty)
        assert 0.9 < time.monotonic() - begun < 5
        with pytest.raises(RuntimeError, match="broken: rank 0 gave up first"):
            dist.all_reduce(torch.ones(1), group=hasty)
    dist.barrier()
    with pytest.raises(RuntimeError, match=r"different collectives|broken"):  # noqa: PT012
        if rank == 0:
            dist.all_reduce(torch.ones(1), group=pair)
        else:
            dist.broadcast(torch.ones(4), 0, group=pair)
            dist.barrier(pair)
    dist.barrier()
    late = torch.zeros(1)
    receive = dist.irecv(late, 1) if rank == 0 else None
    large = torch.ones(1 << 24)
    if rank == 1:
        dist.all_reduce(large, async_op=True)
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 is gone|broken"):  # noqa: PT012
        dist.all_reduce(large)
        dist.barrier()
    if receive is not None:
        with pytest.raises(RuntimeError, match=r"is gone|broken"):
            receive.wait()
    assert time.monotonic() - begun < 10
    (folder / f"survived{rank}").touch()


def test_two_hosts_and_failures(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        launch_to_the_end(4, tmp_path, ranks_failing, tmp_path)
    assert {path.name for path in tmp_path.glob("survived*")} == {"survived0", "survived2", "survived3"}
    left = {name for name in set(os.listdir("/dev/shm")) - before if "whale" in name}
    assert not left


def launch_to_the_end(num: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Like launch, but a dead rank does not end the others."""
    forks = processes.context()
    ranks = [
        forks.Process(target=start, args=(rank, num, folder / "store", work, args)) for rank in range(num)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode is not None
    codes = [rank.exitcode for rank in ranks]
    assert [code for code in codes if code not in (0, -signal.SIGKILL)] == []
    if -signal.SIGKILL in codes:
        raise mp.ProcessExitedException(
            "SIGKILL", codes.index(-signal.SIGKILL), 0, -signal.SIGKILL, "SIGKILL"
        )


def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WHALEPOD_SHM", "0")
    shm.register.cache_clear()
    assert shm.register() == "gloo"
    monkeypatch.delenv("WHALEPOD_SHM")
    monkeypatch.setattr(build, "load", lambda: (_ for _ in ()).throw(build.Unavailable("no compiler")))
    shm.register.cache_clear()
    assert shm.register() == "whale"
    assert "no compiler" in caplog.text
    shm.register.cache_clear()
