"""The plugin library: building it, and finding out what a built one holds."""

from rotexport.plugins.build import (
    ALL_ARCHITECTURES,
    BuildReport,
    KernelResources,
    build_library,
    built_library,
)
from rotexport.plugins.creators import Creator, list_creators, test_library

__all__ = [
    "ALL_ARCHITECTURES",
    "BuildReport",
    "Creator",
    "KernelResources",
    "build_library",
    "built_library",
    "list_creators",
    "test_library",
]
