"""Ranks that are forks of a process which has imported everything but computed nothing: a start costs little.

For scripts, and not for the process of the tests, whose threads a fork would not have.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.default_planner
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

from optima_core.parallel import Ranks, join_ranks


def fork(count: int, work: Callable[[Ranks], None]) -> list[int]:
    """Lets so many ranks do the work; their exit statuses. As under torchrun, none of them holds the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
                torch.set_num_threads(1)
                with join_ranks() as ranks:
                    work(ranks)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
