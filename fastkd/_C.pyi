def cpu_isa() -> str: ...
def cpu_isas() -> str: ...
def release_lingering_memory() -> int: ...
def cuda_architectures() -> str: ...
def cuda_plan(
    rows: int,
    columns: int,
    student_bytes: int,
    teacher_bytes: int,
    mixed_kl: bool,
    with_gradient: bool,
    aligned: bool,
    sparse: bool,
    shard: bool,
    arch: int,
    multiprocessors: int,
    shared_per_block: int,
    shared_per_multiprocessor: int,
    largest_cluster: int,
    wanted: str,
    /,
) -> str: ...
