// CUDA side of the game operators: device, stream and scratch memory around the launchers.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cpu/game_ops.h"
#include "cuda/game_launch.h"
#include "game/bradley_terry.h"
#include "game/mirror.h"
#include "game/regularized.h"
#include "game/simplex.h"
#include "game/tournament.h"

// Weak: a CPU-only libtorch has no such symbol, and the module must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sppo {
namespace game {
namespace {

// Makes the tensor's device current, and gives the previous one back at the end.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    device_ = t.get_device_index();
    cudaGetDevice(&before_);
    if (before_ != device_) cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
                    "the current CUDA stream is not available");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int device_ = 0, before_ = 0;
};

void done(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// Global scratch memory for as many warps as help, within about half a gigabyte.
struct Workspace {
  Tensor work, ints;
  Scratch scratch;

  Workspace(const Tensor& like, int64_t games, int64_t doubles, int64_t int_count)
      : work(make(like, {0}, ScalarType::Double)), ints(make(like, {0}, ScalarType::Int)) {
    const int64_t slots =
        std::max<int64_t>(1, std::min({games, int64_t(8192), (int64_t(1) << 26) / doubles}));
    work = make(like, {slots * doubles}, ScalarType::Double);
    ints = make(like, {slots * int_count}, ScalarType::Int);
    scratch = {data<double>(work), data<int>(ints), slots};
  }
};

struct Cuda {
  template <class T>
  static void targets(const TargetsArgs<T>& a, const Tensor& like) {
    STD_TORCH_CHECK(a.k <= 3072, "x: expected K <= 3072 on CUDA");
    const OnDevice on(like);
    done(launch_targets(a, on.stream()));
  }

  template <class T>
  static void symmetrize(const T* x, T* out, int64_t games, int k, int mode, const Tensor& like) {
    const OnDevice on(like);
    done(launch_symmetrize(x, out, games, k, mode, on.stream()));
  }

  template <class T>
  static void solve(Solver solver, const SolverArgs<T>& a, const Tensor& like) {
    switch (solver) {
      case Solver::kSimplex: return run<Simplex>(launch_simplex<T>, a, like, kSharedGame);
      case Solver::kMirror: return run<Mirror>(launch_mirror<T>, a, like, 0);
      case Solver::kRegularized:
        return run<Regularized>(launch_regularized<T>, a, like, kSharedGame);
      case Solver::kBradleyTerry:
        return run<BradleyTerry>(launch_bradley_terry<T>, a, like, kSharedGame);
      case Solver::kTournament: return run<Tournament>(launch_tournament<T>, a, like, kSharedGame);
    }
  }

  template <class T>
  static void aggregate(const AggregateArgs<T>& a, int64_t, const Tensor& like) {
    const OnDevice on(like);
    const Workspace space(like, a.games, 2 * int64_t(a.k) * a.k, 0);
    done(launch_aggregate(a, space.scratch, on.stream()));
  }

 private:
  template <class S, class T, class Launch>
  static void run(Launch launch, const SolverArgs<T>& a, const Tensor& like, int without_scratch) {
    const OnDevice on(like);
    if (a.k <= without_scratch) return done(launch(a, Scratch{}, on.stream()));
    const Workspace space(like, a.games, S::doubles(a.k), S::ints(a.k) + 1);
    done(launch(a, space.scratch, on.stream()));
  }
};

}  // namespace
}  // namespace game
}  // namespace sppo

STABLE_TORCH_LIBRARY_IMPL(sppo_kernels, CUDA, m) { SPPO_GAME_IMPLS(m, sppo::game::Cuda); }
