"""One check per fairseq patch: it passes with every patch applied, and fails without its own.

Run as a program, since a patch cannot be taken back within a process::

    python tests/fairseq_patch_checks.py                      # every check, every patch applied
    python tests/fairseq_patch_checks.py --without NAME NAME  # these checks, each with its own patch left out
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any


def dataclass_defaults() -> None:
    from fairseq.dataclass.configs import FairseqConfig

    assert FairseqConfig().common.seed == 1


def deepspeed_probe() -> None:
    import fairseq  # noqa: F401

    assert "deepspeed" not in sys.modules, "import fairseq imported deepspeed"


def checkpoint_loading() -> None:
    import numpy as np
    import torch
    from fairseq import checkpoint_utils

    state = {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="transformer"), "common": {"seed": 1}, "task": {"_name": "x"}},
        "model": {"weight": torch.ones(2)},
        "optimizer_history": [{"criterion_name": "c", "best_loss": np.float64(1.5), "num_updates": 3}],
        "extra_state": {"epoch": 1, "val_loss": np.float32(2.5), "train_iterator": {"epoch": 1}},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        torch.save(state, path)
        loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert loaded["cfg"].model.arch == "transformer"
    assert loaded["extra_state"]["val_loss"] == 2.5


def plain_values() -> None:
    from fairseq.utils import eval_str_list

    with tempfile.TemporaryDirectory() as folder:
        ran = Path(folder, "ran")
        try:
            eval_str_list(f"__import__('os').mkdir({str(ran)!r})")
        except Exception as error:
            assert not ran.exists(), "an option ran as code"
            assert "not a plain value" in str(error)
    assert eval_str_list("[1] * 2 + [3]", int) == [1, 1, 3]


def object_broadcast() -> None:
    import numpy as np
    import torch
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    sent = {"weights": torch.arange(3), "args": argparse.Namespace(seed=7), "cfg": OmegaConf.create({"a": [1, None]})}

    def rank(number: int, store: str) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
        group = torch.distributed.group.WORLD
        got = utils.broadcast_object(sent if number == 0 else None, src_rank=0, group=group)
        torch.distributed.destroy_process_group()
        assert torch.equal(got["weights"], sent["weights"])
        assert (got["args"], got["cfg"]) == (sent["args"], sent["cfg"])

    _two_ranks(rank)
    # Statistics go through utils.pickle.
    statistics = [OrderedDict(loss=torch.ones(2), nll=np.float64(1.5)), {"ntokens": 3}]
    got = utils.pickle.loads(utils.pickle.dumps(statistics))
    assert torch.equal(got[0]["loss"], statistics[0]["loss"]) and got[1] == statistics[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            utils.pickle.loads(b"cos\nmkdir\n(V" + folder.encode() + b"/built\ntR.")
        except utils.pickle.UnpicklingError as error:
            assert "posix.mkdir" in str(error) or "os.mkdir" in str(error)
        assert not os.listdir(folder)


def single_node_store() -> None:
    from fairseq.dataclass.configs import DistributedTrainingConfig
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    config = OmegaConf.structured(DistributedTrainingConfig(distributed_world_size=0))  # as many as there are GPUs
    config.tpu = False
    utils.infer_init_method(config, force_distributed=True)
    kind, _, path = config.distributed_init_method.partition("://")
    assert kind == "file", f"{config.distributed_init_method} listens"
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def encoder_layer_loading() -> None:
    import torch
    from fairseq.models.transformer import TransformerConfig
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    config = TransformerConfig()
    config.encoder.embed_dim, config.encoder.ffn_embed_dim, config.encoder.attention_heads = 8, 16, 2
    torch.manual_seed(0)
    source, layer = TransformerEncoderLayerBase(config).eval(), TransformerEncoderLayerBase(config).eval()
    trained = {k: v for k, v in source.state_dict().items() if "in_proj" not in k and "_weight" not in k.split(".")[-1]}
    trained = {k: v for k, v in trained.items() if not k.endswith("_bias")}
    layer.load_state_dict(dict(trained))
    x = torch.randn(3, 2, 8)  # [time, sentences, width]: attention would mix sentences if taken batch first
    with torch.no_grad():
        torch.testing.assert_close(layer(x, None), source(x, None))


def hydra_compose() -> None:
    import hydra.version
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra.core.global_hydra import GlobalHydra

    with tempfile.TemporaryDirectory() as folder, hydra.initialize_config_dir(folder, version_base="1.3"):
        before = GlobalHydra.instance()
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, ["data", "--arch", "transformer", "--lr", "0.5", "--seed", "5"])
        config = convert_namespace_to_omegaconf(args)
        assert (config.common.seed, config.optimization.lr, config.model.arch) == (5, [0.5], "transformer")
        assert GlobalHydra.instance() is before and hydra.version.base_at_least("1.3")


def ddp_on_cpu() -> None:
    import torch
    from fairseq.dataclass.configs import DistributedTrainingConfig
    from fairseq.models import DistributedFairseqModel

    config = DistributedTrainingConfig(ddp_backend="pytorch_ddp", device_id=0)
    config.tpu = False
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        model = DistributedFairseqModel(config, torch.nn.Linear(2, 2), None, torch.device("cpu"))
        model(torch.ones(1, 2)).sum().backward()
        torch.distributed.destroy_process_group()


def numpy_names() -> None:
    import torch
    from fairseq.data.data_utils import compute_mask_indices
    from fairseq.modules import DynamicCRF

    mask = compute_mask_indices((2, 40), None, 0.5, 4, no_overlap=True)
    assert mask.shape == (2, 40) and mask.any()
    crf = DynamicCRF(20, low_rank=4, beam_size=5)
    loss = crf(torch.randn(2, 6, 20), torch.randint(20, (2, 6)), torch.ones(2, 6).bool())
    assert torch.isfinite(loss).all()


def _two_ranks(body: Callable[[int, str], Any]) -> None:
    """Runs ``body(rank, store)`` in this process and in a forked one; raises what the fork raised."""
    with tempfile.TemporaryDirectory() as folder:
        store, message = os.path.join(folder, "store"), Path(folder, "message")
        child = os.fork()
        if child == 0:
            try:
                body(1, store)
                os._exit(0)
            except BaseException:
                message.write_text(traceback.format_exc())
                os._exit(1)
        try:
            body(0, store)
        finally:
            status = os.waitpid(child, 0)[1]
            if status:
                raise RuntimeError(message.read_text())


CHECKS = {
    check.__name__: check
    for check in (
        dataclass_defaults,
        deepspeed_probe,
        checkpoint_loading,
        plain_values,
        object_broadcast,
        single_node_store,
        encoder_layer_loading,
        hydra_compose,
        ddp_on_cpu,
        numpy_names,
    )
}


def fails_without(name: str) -> str:
    """Runs one check in a fork, which applies every patch but that one; returns the traceback, or "" if it passed."""
    from moe_train.fairseq_compat import apply

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        report = ""
        try:
            apply(skip=(name,))
            CHECKS[name]()
        except BaseException:
            report = traceback.format_exc()
        os.write(writer, report[-4000:].encode(errors="replace"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        report = stream.read().decode(errors="replace")
    os.waitpid(child, 0)
    return report


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--without"]:
        for name in ("torch.distributed", "torch.onnx", "torch.utils.tensorboard", "sacrebleu", "hydra.main"):
            importlib.import_module(name)  # what takes longest to import, once for all forks
        print(json.dumps({name: fails_without(name) for name in arguments[1:]}))
        return
    from moe_train.fairseq_compat import apply

    apply()
    for name, check in CHECKS.items():
        check()
        print("passed", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
