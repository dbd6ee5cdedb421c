"""P6: importing sparseft touches no device, environment or global state, and needs no Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

PROBE = """
    import json, logging, os, random, sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in BLOCKED:
                raise ImportError(f'{name} is blocked in this test')
    BLOCKED = %r
    sys.meta_path.insert(0, Blocked())
    env, rng, level = dict(os.environ), random.getstate(), logging.getLogger().level
    handlers = list(logging.getLogger().handlers)
    import sparseft
    before_torch = 'torch' in sys.modules
    for name in sparseft.__all__:
        getattr(sparseft, name)
    import torch
    print(json.dumps({
        'env': env == dict(os.environ),
        'rng': rng == random.getstate(),
        'logging': (level, handlers) == (logging.getLogger().level, logging.getLogger().handlers),
        'lazy': not before_torch,
        'triton': 'triton' in sys.modules and 'sparseft_kernels' in sys.modules,
        'transformers': 'transformers' in sys.modules,
        'cuda': torch.cuda.is_initialized(),
        'grad': torch.is_grad_enabled(),
        'dtype': str(torch.get_default_dtype()),
    }))
"""


def probe(blocked: tuple[str, ...]) -> dict:
    code = textwrap.dedent(PROBE % (blocked,))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_every_public_name_changes_nothing():
    seen = probe(())
    assert seen["env"]
    assert seen["rng"]
    assert seen["logging"]
    assert seen["lazy"], "`import sparseft` alone imported torch"
    assert not seen["triton"], "kernels are imported in the launch path only"
    assert not seen["cuda"]
    assert seen["grad"]
    assert seen["dtype"] == "torch.float32"


def test_works_without_triton_and_without_transformers():
    seen = probe(("triton", "sparseft_kernels", "transformers", "datasets", "babel", "matplotlib"))
    assert not seen["transformers"]


def test_no_public_name_is_a_module_too():
    """Importing ``sparseft.x`` sets the attribute ``x`` of the package, over a function's name."""
    import importlib.util

    import sparseft

    assert [n for n in sparseft.__all__ if importlib.util.find_spec(f"sparseft.{n}")] == []
