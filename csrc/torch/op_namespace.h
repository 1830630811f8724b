// The namespace of torch.ops that the ops are registered in. The tests' emulator registers the same
// ops in one of its own.
#pragma once

#ifndef SA_OP_NAMESPACE
#define SA_OP_NAMESPACE sink_attention_ext
#endif
