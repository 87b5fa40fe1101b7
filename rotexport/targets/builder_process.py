"""Build one plan in a process of its own: `python builder_process.py REQUEST.json`.

Builders abort the whole process on some graphs, so each plan is built here and a crash stays here. The file
is run by path and imports nothing of rotexport: starting it costs one TensorRT import. The request holds
`module` (tensorrt_rtx or tensorrt), `model`, `plan`, `layers`, `compute_capability` (null: the GPU present),
`plugins` (a library to load first, or null) and `profiles`, a list of {input: [min, opt, max shape]}. The
plan and the builder's layer list are written to the files named; all that the builder says goes to standard
output. Exit status 0 means that both exist.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

Request = dict[str, Any]


def main(request: Request) -> str | None:
    """Build what the request says; the error, if any, becomes the last line and a non-zero exit status."""
    trt = importlib.import_module(request["module"])

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keep the layer list and pass errors on; the rest of a verbose log is megabytes."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if "LayerType:" in message:
                self.layers.append(message)
            elif severity <= trt.ILogger.Severity.ERROR:
                print(message, flush=True)

    log = Log()
    if request["plugins"] is not None and trt.get_plugin_registry().load_library(request["plugins"]) is None:
        return f"the plugin registry refuses {request['plugins']}"
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "the parser failed"
    plan = builder.build_serialized_network(network, _configuration(trt, builder, request))
    if plan is None:
        return "the builder returned no plan"
    Path(request["layers"]).write_text("\n".join(log.layers))
    with Path(request["plan"]).open("wb") as file:
        file.write(memoryview(plan))
    return None


def _configuration(trt: Any, builder: Any, request: Request) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["compute_capability"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["compute_capability"]), 0)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    return config


if __name__ == "__main__":
    sys.path.pop(0)  # this directory: its modules must not hide installed ones
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
