"""The plugin library: building it, and finding out what a built one holds."""

from rotexport.plugins.build import BuildReport, KernelResources, build_library
from rotexport.plugins.creators import Creator, list_creators, test_library

__all__ = ["BuildReport", "Creator", "KernelResources", "build_library", "list_creators", "test_library"]
