"""Every method of the communicator on every rank; exits 0 if all results are right."""

import sys

import torch

from hpc_absa.comm import connect

comm = connect()
size, rank = comm.size, comm.rank
assert size == int(sys.argv[1]), f"{size} ranks"
assert comm.backend == sys.argv[2], comm.backend
total = size * (size + 1) / 2
for dtype in (torch.float32, torch.float64, torch.int64):
    mine = torch.full((5,), rank + 1, dtype=dtype)
    assert comm.allreduce_(mine.clone()).tolist() == [total] * 5
    assert comm.broadcast_(mine.clone(), root=size - 1).tolist() == [size] * 5
    if size & (size - 1) == 0:
        assert comm.allreduce_recursive_doubling_(mine.clone()).tolist() == [total] * 5
# Calls of different ranks belong together by name, in any order.
tensors = {name: torch.full((3,), float(rank)) for name in "abcd"}
names = list(tensors) if rank % 2 else list(reversed(tensors))
handles = [comm.allreduce_async_(tensors[name], name) for name in names]
for handle in handles:
    comm.wait(handle)
assert all(t.tolist() == [total - size] * 3 for t in tensors.values())
for dtype in (torch.float32, torch.float16):  # by MPI itself, and by Horovod
    pair = [torch.full((3,), rank + 1, dtype=dtype) for _ in range(2)]
    comm.allreduce_list_(pair, f"pair.{dtype}")
    assert [tensor.tolist() for tensor in pair] == [[total] * 3] * 2
assert comm.broadcast_object({"from": rank}, root=0) == {"from": 0}
assert comm.allgather_object((rank, "x")) == [(r, "x") for r in range(size)]
# Of other types on other ranks, as an error of one rank and the decision of rank 0 are.
assert comm.allgather_object("x" if rank else None) == [None, *["x"] * (size - 1)]
assert comm.broadcast_object(None if rank else 7) == 7
assert comm.exchange_calls("x" if rank else None) == [None, *["x"] * (size - 1)]
assert list(comm.gather_object((rank, "x"))) == [(r, "x") for r in range(size) if rank == 0]
gathered = comm.gather_object(bytes(100_000))  # which MPI sends only once it is received
assert next(gathered, None) == (None if rank else bytes(100_000))
gathered.close()
assert comm.allreduce_(torch.tensor(1.5, dtype=torch.float64)).item() == 1.5 * size
comm.close()
