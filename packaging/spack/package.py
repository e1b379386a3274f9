"""Recipe for Spack; docs/install.md has the commands."""

from spack_repo.builtin.build_systems.cuda import CudaPackage
from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyD2v(PythonPackage, CudaPackage):
    """Pre-train data2vec models with fused CUDA, Triton and CPU operators."""

    license("Apache-2.0")

    # Sources: `spack develop --path /path/to/d2v py-d2v@0.1.0`, or add `url` of your archive and its checksum.
    version("0.1.0")

    variant("train", default=True, description="what the command d2v needs beyond operators and model")

    depends_on("cxx", type="build")
    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-wheel", type="build")
    depends_on("cmake@3.24:", type="build")
    depends_on("ninja", type="build")
    depends_on("py-pybind11@2.13:", type="build")

    depends_on("py-torch@2.10:", type=("build", "link", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-safetensors@0.4.5:", type=("build", "run"))
    with when("+train"):
        depends_on("py-tyro@0.9:", type="run")
        depends_on("pil@10:", type="run")
        depends_on("py-webdataset@0.2.100:", type="run")
        depends_on("py-tensorboard@2.16:", type="run")
        depends_on("py-tqdm@4.66:", type="run")
        depends_on("py-matplotlib@3.8:", type="run")
        depends_on("py-scikit-learn@1.4:", type="run")
        depends_on("py-soundfile@0.12:", type="run")
        depends_on("py-scipy@1.11:", type="run")
        depends_on("py-tokenizers@0.20:", type="run")
        depends_on("py-tomli@2:", when="^python@:3.10", type="run")
    for arch in CudaPackage.cuda_arch_values:
        depends_on(f"py-torch+cuda cuda_arch={arch}", when=f"+cuda cuda_arch={arch}")
    depends_on("cuda@12.8:", when="+cuda")

    def setup_build_environment(self, env):
        """Settings of setup.py: docs/install.md."""
        env.set("D2V_REQUIRE_NATIVE", "1")
        env.set("D2V_BUILD_CUDA", "1" if self.spec.satisfies("+cuda") else "0")
        if self.spec.satisfies("+cuda"):
            archs = self.spec.variants["cuda_arch"].value
            env.set("D2V_CUDA_ARCHS", ";".join(f"{arch}-real" for arch in archs))
