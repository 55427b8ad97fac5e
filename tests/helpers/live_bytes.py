"""How many bytes of tensors are alive, counted from outside: an oracle for memory/count.py."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations inside the `with` make, from birth to death; those of `known`
    tensors (parameters, gradients) are left out. `now`, `peak` in bytes."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive, self.refs = {}, []
        self.now = self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive or key in self.known:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

        def gone(_):
            self.now -= self.alive.pop(key)

        self.refs.append(weakref.ref(storage, gone))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t.untyped_storage())
        return out
