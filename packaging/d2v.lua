-- A module for Lmod over an environment at `root`: save as d2v/0.1.0.lua in a folder of MODULEPATH.
help("d2v: data2vec pre-training with fused operators. `d2v recipes` lists what there is.")
whatis("Name: d2v")
whatis("Version: 0.1.0")
local root = "/apps/d2v/0.1.0"
conflict("d2v")
prepend_path("PATH", pathJoin(root, "bin"))
setenv("VIRTUAL_ENV", root)
setenv("PYTHONNOUSERSITE", "1") -- packages of a home would shadow those of the module
