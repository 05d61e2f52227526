// The feed-forward of a mixture of experts: each row of x meets the few experts that its router prefers.
#pragma once
#include <vector>

#include "pack.h"

namespace quire {

// How scores choose experts, and weigh them.
struct Choice {
    int64_t taken;
    bool sum_to_one;                 // shares are divided by the sum of those that are taken
    bool sigmoid;                    // an expert's share is the sigmoid of its score; else that of the softmax of all
    float scale;                     // factor on shares
    std::vector<float> correction;   // of each expert, added to its share where it is chosen by; or none
};

class Experts {
public:
    // up: of each expert, gate and up (or up alone); down. Those of one list are alike, but for their bytes, which are moved together.
    // Biases of all experts, one after the other, gates first; or none.
    Experts(std::vector<PackedLinear*> up, std::vector<PackedLinear*> down, Choice choice, std::vector<float> up_bias,
            std::vector<float> down_bias);

    struct Args {
        const float* x;            // [m, hidden]
        const float* scores;       // [m, experts], of the router
        float* out;                // [m, hidden]
        float* rows;               // [m * taken, hidden]: what experts take, and then what they give
        float* inner;              // [m * taken, intermediate]
        int64_t m, x_stride, scores_stride, out_stride, rows_stride, inner_stride;
        bool accumulate;           // out += instead of out =
        Activation activation;
    };
    // Calls of one object must not overlap, unless they are on threads of their own.
    void run(const Args& args) const;

    int64_t count() const { return static_cast<int64_t>(up_.size()); }
    int64_t taken() const { return choice_.taken; }
    const PackedLinear& up() const { return *up_[0]; }
    const PackedLinear& down() const { return *down_[0]; }
    int64_t nbytes() const { return count() * (up().nbytes + down().nbytes); }
    const PackedLinear* then = nullptr;   // what is read after them; must outlive them

private:
    std::vector<PackedLinear*> up_, down_;
    Choice choice_;
    std::vector<float> up_bias_, down_bias_;
    Readings &up_readings_, &down_readings_;
};

}  // namespace quire
