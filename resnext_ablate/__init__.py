"""FLOPs-matched ResNeXt ablations: design, train, compare and report.

The modules form one direction of data flow: a spec is matched, trained, recorded,
tested and drawn. See the file map in the README.
"""

__version__ = "0.1.0"
