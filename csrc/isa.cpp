// The CPU kernels for one instruction set: compiled once for each, with VIT_FAST_ISA as its name and the flags that turn it on.
// No other file gets those flags.

#include "attention.h"
#include "layer_norm.h"
#include "linear.h"
#include "patch_embed.h"

#define VIT_FAST_TEXT_OF(name) #name
#define VIT_FAST_TEXT(name) VIT_FAST_TEXT_OF(name)

namespace vit_fast::VIT_FAST_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    VIT_FAST_TEXT(VIT_FAST_ISA),
    PANEL,
    layer_norm_forward,
    layer_norm_backward,
    product_pack,
    product,
    product_panels,
    product_tiles,
    product_packed_size,
    product_scratch_size,
    epilogue_backward,
    stochastic_depth,
    attention_block,
    attention_forward_scratch,
    attention_backward_scratch,
    attention_forward,
    attention_backward,
    gather_patches,
    patch_scatter,
    add_rows,
};

}  // namespace vit_fast::VIT_FAST_ISA
