from mimkernels.ops.patchify_gather.api import patchify_gather as patchify_gather
