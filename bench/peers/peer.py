"""llama.cpp, built from the PyPI package llama-cpp-python into a cache outside the repository."""
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "llama-cpp-python"
# The version the recorded figures are from; --llama-version takes another.
VERSION = "0.3.36"
SETTLE_SECONDS = 10


def log(text):
    print(text, file=sys.stderr, flush=True)


def run(command, **options):
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            check=False, **options)
    if result.returncode != 0:
        sys.exit(f"error: {command[0]} failed ({result.returncode}): {result.stderr.strip()[-2000:]}")
    return result.stdout


def run_alone(command):
    """A measurement: not before what ran last has left the machine. Virtual machines give freed memory back to their
    host, which takes a core away for seconds (a prefill of 8 s took 12 after another process had freed 4 GB)."""
    time.sleep(SETTLE_SECONDS)
    return run(command)


# ---- the peer ----------------------------------------------------------------------------------

def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "duet-peers"


def fetch_source(version):
    """The llama.cpp tree inside the source archive."""
    folder = cache_folder() / f"llama_cpp_python-{version}"
    if not folder.exists():
        log(f"fetching {PACKAGE} {version} ...")
        cache_folder().mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE,
             "-d", cache_folder(), f"{PACKAGE}=={version}"])
        archive = next(cache_folder().glob(f"llama_cpp_python-{version}*.tar.gz"))
        partial = cache_folder() / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial)
        next(partial.iterdir()).rename(folder)
    return folder / "vendor/llama.cpp"


def build_peer(version, avx512):
    source = fetch_source(version)
    build = source.parents[1] / ("build" if avx512 else "build-avx2")
    binary = build / "bin/llama-bench"
    if binary.exists():
        return build / "bin"
    flags = (["-DGGML_NATIVE=ON"] if avx512 else
             ["-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON"])
    log(f"building llama.cpp in {build} ...")
    run(["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF",
         "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", *flags])
    run(["cmake", "--build", build, "--target", "llama-bench", "--parallel", str(os.cpu_count() or 1)])
    return build / "bin"


def system_info(folder):
    """What the peer's library says about the instructions it was built for."""
    library = folder / "libllama.so"
    if not library.exists():
        return "unknown (no shared library beside llama-bench)"
    lib = ctypes.CDLL(str(library))
    lib.llama_print_system_info.restype = ctypes.c_char_p
    return lib.llama_print_system_info().decode()


class Peer:
    def __init__(self, folder):
        self.binary = folder / "llama-bench"
        if not self.binary.exists():
            sys.exit(f"error: {self.binary} is missing")
        self.info = system_info(folder)
        self.commit = "unknown"

    def speeds(self, model, test, settings, repetitions):
        flash, repack, micro_batch = settings
        command = [self.binary, "-m", model, "-p", test.n if test.prefill else 0, "-n", 0 if test.prefill else test.n,
                   "-d", test.depth, "-t", test.threads, "-r", repetitions, "-o", "json", "--repack", repack,
                   "-b", max(2048, micro_batch), "-ub", micro_batch, "-ctk", test.kv_type, "-ctv", test.kv_type]
        if flash != "default":
            command += ["-fa", flash]
        (result,) = json.loads(run_alone(command))
        self.commit = f"{result['build_commit']} ({result['build_number']})"
        return result["samples_ts"]


def add_peer_options(parser):
    parser.add_argument("--llama-bin", type=pathlib.Path, metavar="DIR", help="folder with llama-bench, instead of a build")
    parser.add_argument("--llama-version", default=VERSION, help=f"of {PACKAGE} [default: {VERSION}]")
    parser.add_argument("--duet", type=pathlib.Path, default=os.environ.get("DUET", ROOT / "build/release/duet"))
