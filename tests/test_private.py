"""Private parts of other libraries are used in one file, and each is still needed."""

import ast
import atexit
import inspect
import os
import sys
from argparse import ArgumentParser
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
import wandb
from test_finetuning import EVERY_2, lives
from test_structure import FILES, PACKAGE
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.swa_utils import AveragedModel
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lit_purify.private import average_in_few_kernels, copies, leave, mend_resumed, settings_of
from lit_purify.training import task
from lit_purify.training.checkpoints import Averaging


def names(tree):
    """What a file defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_lists_of_tensors_have_no_public_operations():
    tensors = [torch.rand(3), torch.rand(2, 2)]
    assert all(a is not b and a.equal(b) for a, b in zip(copies(tensors), tensors, strict=True))
    assert not any(name.startswith("foreach") for name in dir(torch))


def test_parsers_list_no_arguments_in_public():
    parser = ArgumentParser()
    parser.add_argument("--runs", type=int)
    assert settings_of(parser) == {"help": None, "runs": int}
    assert not any("action" in name for name in dir(parser) if not name.startswith(("_", "add_")))


def test_torchmetrics_takes_no_weights_of_lpips():
    """When its public class does, ``perceptual_network`` can go; that it works: test_lf.py."""
    known = set(inspect.signature(LearnedPerceptualImagePatchSimilarity).parameters)
    assert known == {"net_type", "reduction", "normalize", "kwargs"}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_private_parts_are_used_in_one_file():
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    # Of named tuples, and of the operating system: public.
    own = {name for tree in trees.values() for name in names(tree)} | {"_asdict", "_replace", "_exit"}
    for path, tree in trees.items():
        used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.module.startswith("lit_purify"):
                used += [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                used += [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                used += [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
        foreign = [name for name in used if private(name) and name not in own]
        assert not foreign or path == PACKAGE / "private.py", f"{path}: {foreign}"


def leaving(folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register((folder / "left").touch)
    try:
        torch.nn.SyncBatchNorm(3)(torch.rand(2, 3, 4, 4))
    except ValueError:
        leave(7)


def test_who_leaves_runs_the_exit_functions_and_torch_synchronizes_batches_on_gpus_alone(tmp_path):
    """When it does on CPUs, Lightning's ``sync_batchnorm`` can take the place of ``training/batch_norm.py``."""
    # Not a fork: its exit functions would remove temporary folders of the process that it was forked from.
    process = get_context("spawn").Process(target=leaving, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert (tmp_path / "left").exists()


def count(folder):
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / attempt).write_text(str(store.add("processes", 1)))
    sys.exit(1 - int(attempt))


def restart(folder):
    settings = LaunchConfig(1, 1, 1, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1)
    settings.start_method = "fork"
    elastic_launch(settings, count)(folder)


def test_torchrun_keeps_its_store_over_restarts(tmp_path):
    """When it no longer does, ``renew_store`` can go."""
    process = get_context("fork").Process(target=restart, args=(tmp_path,))
    process.start()
    process.join(60)
    assert (tmp_path / "0").read_text() == "1"
    assert (tmp_path / "1").read_text() == "2"


def saving(trainer):
    """All but the last part of ``mend_resumed``."""
    (callback,) = trainer.checkpoint_callbacks
    saved = callback._last_global_step_saved
    mend_resumed(trainer)
    callback._last_global_step_saved = saved


@pytest.mark.parametrize(
    ("mend", "batches", "checkpoints", "options"),
    [
        (lambda trainer: None, (5, 3), EVERY_2, {"max_epochs": 3}),
        (lambda trainer: None, (5, 6), {"every_n_epochs": 1}, {"max_steps": 11}),
        (saving, (5, 2), EVERY_2, {"max_epochs": 3, "accumulate_grad_batches": 3}),
    ],
    ids=["within epochs", "ends", "accumulation"],
)
def test_lightning_resumes_otherwise(tmp_path, monkeypatch, mend, batches, checkpoints, options):
    """When it no longer does, the part of ``mend_resumed`` can go; with it: test_finetuning.py."""
    steps, expected = lives(tmp_path / "through", (), checkpoints, **options)
    monkeypatch.setattr(task, "mend_resumed", mend)
    try:
        resumed_steps, resumed = lives(tmp_path / "resumed", batches, checkpoints, **options)
    except AssertionError:
        return
    assert resumed_steps != steps or not all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_wandb_has_no_setting_for_where_it_stages():
    """When it has, ``stage_artifacts`` can go."""
    assert not [name for name in wandb.Settings.model_fields if "data_dir" in name or "staging" in name]


def test_averages_are_those_of_torch_without_a_question_to_the_device():
    """Bit for bit, also after a checkpoint."""

    def average(mean, current, updates):
        return current.lerp(mean, ((1 + updates) / (10 + updates)).clamp(max=0.3).to(mean.dtype))

    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5))
    theirs, callback = AveragedModel(model, avg_fn=average), Averaging(0.3)
    for resumed in (False, True):
        before = callback._average_model
        callback._average_model = AveragedModel(model)
        if resumed:
            callback._average_model.load_state_dict(before.state_dict())
        average_in_few_kernels(callback, callback._kept)
        for _ in range(4):
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data.add_(1) if tensor.dtype == torch.long else tensor.data.normal_()
            theirs.update_parameters(model)
            callback._average_model.update_parameters(model)
    own = callback._average_model.state_dict()
    assert all(value.equal(own[name]) for name, value in theirs.state_dict().items())
    assert int(own["n_averaged"]) == 8
