"""All checks of this machine and, under a launcher, of the ranks among each other."""

import os
import resource
import shutil
import socket
import sys
from pathlib import Path

from unitdist.doctor import machine, probes, software
from unitdist.doctor.data_folder import check_data
from unitdist.doctor.finding import Finding, note
from unitdist.doctor.needs import Needs
from unitdist.world import World

_INSTALL = "pip install -c constraints.txt -e ."


def examine_node(needs: Needs, torch: software.Torch, world: World, *, port: int | None) -> list[Finding]:
    """Everything about this node. `port`: the rendezvous port that the user named, None: torch's default."""
    return [*check_software(needs, torch), *check_machine(needs, world, gpus=len(torch.gpus), port=port)]


def check_software(needs: Needs, torch: software.Torch) -> list[Finding]:
    no_torch = software.check_torch_imports(torch)
    if no_torch is not None:
        return [software.check_python(tuple(sys.version_info[:3])), no_torch, *check_without_torch(needs, torch)]
    packages = probes.package_facts(probes.PACKAGES)
    compiler, error, has_ninja = probes.compiler_facts()
    uses = {
        "torchvision": "decodes for data.loader=torchvision and builds its networks",
        "timm": "LARS, LAMB, mixup, timm's networks",
        "accelerate": "starts the processes of a training",
    }
    triton = check_triton(packages["Triton"], torch)
    findings = [
        software.check_python(tuple(sys.version_info[:3])),
        software.check_torch(torch),
        software.check_gpus(torch),
        software.check_nccl(torch),
        *(
            software.check_package(packages[name], required=True, install=_INSTALL, purpose=purpose)
            for name, purpose in uses.items()
        ),
        software.check_dali(packages["DALI"], probes.dali_wheels(), torch, required=needs.dali),
        software.check_deepspeed(
            packages["DeepSpeed"],
            torch,
            has_transformers=probes.installed_version("transformers") is not None,
            required=needs.deepspeed,
        ),
        triton,
        software.check_compiler(compiler, error, has_ninja=has_ninja, required=needs.compiler),
    ]
    locks = software.check_extension_locks(probes.extension_locks())
    return findings + ([locks] if locks is not None else [])


def check_without_torch(needs: Needs, torch: software.Torch) -> list[Finding]:
    """What can be said of the other software where torch does not import."""
    compiler, error, has_ninja = probes.compiler_facts()
    dali = probes.package_facts(("DALI",))["DALI"]
    return [
        note(
            "not seen", f"{', '.join(('GPUs', 'NCCL', *probes.NEED_TORCH))}: they need torch; run the doctor again then"
        ),
        software.check_dali(dali, probes.dali_wheels(), torch, required=needs.dali),
        software.check_compiler(compiler, error, has_ninja=has_ninja, required=needs.compiler),
    ]


def check_triton(package: software.Package, torch: software.Torch) -> Finding:
    """Required where there is a GPU: the layer's kernels are written in it."""
    return software.check_package(
        package, required=bool(torch.gpus), install=_INSTALL, purpose="the layer's kernels on CUDA, and torch.compile"
    )


def check_machine(needs: Needs, world: World, *, gpus: int, port: int | None) -> list[Finding]:
    launched = world.size > 1
    name = socket.gethostname()
    shm = Path("/dev/shm")
    findings = [
        check_data(
            needs.data, train_split=needs.train_split, val_split=needs.val_split, image_folder=needs.image_folder
        ),
        machine.check_run_folder(needs.run_folder, probes.write_error(needs.run_folder)),
        machine.check_disk(
            shutil.disk_usage(probes.nearest_existing(needs.run_folder)).free,
            needs.checkpoint_bytes,
            files=needs.checkpoint_files,
        ),
        machine.check_shared_memory(
            shutil.disk_usage(shm).total if shm.is_dir() else None, torchvision_workers=needs.torchvision_workers
        ),
        machine.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        machine.check_host_name(name, machine.addresses_of(name)),
        machine.check_cores(
            machine.usable_cores(),
            world.local_size if launched else max(gpus, 1),
            threads_per_rank=needs.threads_per_rank,
            omp_threads=os.environ.get("OMP_NUM_THREADS"),
        ),
        machine.check_restarts(os.environ),
    ]
    if port is not None or not launched:  # under a launcher the default port may be this very job's
        number = machine.DEFAULT_PORT if port is None else port
        findings.append(machine.check_port(number, machine.port_error(number), asked_for=port is not None))
    return findings


def examine(needs: Needs, torch: software.Torch | None, world: World, *, port: int | None) -> list[Finding]:
    """The findings of the whole job, the same on every rank; needs a process group where the world is larger than one.

    `torch`: as `probes.torch_facts` has it, on the first rank of each node, which looks at the node; None on the others.
    Rank 0's node is told in full; of the others what it does not have itself.
    """
    own = [] if torch is None else examine_node(needs, torch, world, port=port)
    if world.size == 1:
        return [*own, note("clocks", "one process; start the doctor under torchrun to compare the clocks of nodes")]
    from unitdist.doctor import ranks  # needs torch

    host = socket.gethostname()
    hosts = ranks.gather(host, world)
    nodes = ranks.gather(own, world)
    findings = list(nodes[0])
    for name, found in zip(hosts[1:], nodes[1:], strict=True):
        findings += on_other_node(name, found, known=findings)
    versions = ranks.gather(ranks.own_software(), world)
    return [
        *findings,
        ranks.check_same_software(versions, hosts),
        ranks.check_clocks(ranks.clock_offsets(), hosts),
    ]


def on_other_node(host: str, found: list[Finding], *, known: list[Finding]) -> list[Finding]:
    """Warnings and faults of another node that are not already told of one."""
    told = {(one.area, one.text) for one in known}
    return [
        Finding(area=one.area, level=one.level, text=f"{host}: {one.text}", remedy=one.remedy)
        for one in found
        if one.level in ("warning", "fault") and (one.area, one.text) not in told
    ]
