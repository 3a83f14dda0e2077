"""Run in a process of its own, with Seed-VC's unpacked wheel on the path: what its loader does with pairs.

Reads JSON lines ``{"file": …, "config": …}`` and answers each with the tensors of the model that kept their initial
values, or the error. Modules that the loader imports and does not need are replaced by empty ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types
import warnings


def main() -> None:
    warnings.simplefilter("ignore")
    unused = types.ModuleType("audiocodec.dac.nn.quantize")
    unused.VectorQuantize = object  # type: ignore[attr-defined]
    sys.modules["audiocodec.dac.nn.quantize"] = unused
    import torch
    import yaml
    from seed_vc.modules.commons import build_model, load_checkpoint, recursive_munch

    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        with open(asked["config"]) as file:
            params = recursive_munch(yaml.safe_load(file)["model_params"])
        params.dit_type = "DiT"
        model = build_model(params, stage="DiT")
        # a value that no file has: what still has it afterwards was not loaded
        for module in model.values():
            for tensor in module.state_dict().values():
                tensor.fill_(-77)
        told = io.StringIO()
        answer: dict[str, object] = {}
        try:
            with contextlib.redirect_stdout(told):
                load_checkpoint(
                    model, None, asked["file"], load_only_params=True, ignore_modules=[], is_distributed=False
                )
            tensors = {f"{name}.{key}": tensor for name, module in model.items()
                       for key, tensor in module.state_dict().items()}  # fmt: skip
            answer["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
            answer["random"] = [name for name, tensor in tensors.items() if bool((tensor == -77).all())]
            if asked.get("digest"):
                answer["sums"] = {name: tensor.double().sum().item() for name, tensor in tensors.items()}
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answer["told"] = told.getvalue()
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
