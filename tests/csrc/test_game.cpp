// Unit test of csrc/game for the host, without torch: compiled under AddressSanitizer and
// UndefinedBehaviorSanitizer by tests/test_game_sanitizers.py. Every solver works in a buffer of
// exactly the size it states, so that a wrong size is an error. Usage: test_game SEED.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <random>
#include <vector>

#include "game/aggregate.h"
#include "game/bradley_terry.h"
#include "game/mirror.h"
#include "game/regularized.h"
#include "game/simplex.h"
#include "game/targets.h"
#include "game/tournament.h"

using namespace sppo::game;

static int failures = 0;
#define EXPECT(condition)                                              \
  do {                                                                 \
    if (!(condition)) {                                                \
      ++failures;                                                      \
      fprintf(stderr, "line %d: %s is false\n", __LINE__, #condition); \
    }                                                                  \
  } while (0)

template <class T>
struct Batch {
  std::vector<T> x;
  std::vector<int64_t> lengths;
  int games, k;
};

template <class T>
static Batch<T> random_games(std::mt19937& random, int games, int k, bool ragged) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Batch<T> b{std::vector<T>(size_t(games) * k * k), {}, games, k};
  for (int g = 0; g < games; ++g) {
    for (int i = 0; i < k; ++i) {
      b.x[(g * k + i) * k + i] = T(0.5);
      for (int j = i + 1; j < k; ++j) {
        const int kind = g % 3;  // generic, ties, deterministic
        double p = uniform(random);
        if (kind == 1) p = floor(p * 3) / 2;
        if (kind == 2) p = p > 0.5;
        b.x[(g * k + i) * k + j] = T(p);
        b.x[(g * k + j) * k + i] = T(1) - T(p);
      }
    }
    if (ragged) b.lengths.push_back(2 + random() % (k - 1));
  }
  return b;
}

// Runs a solver on each game of a batch in exactly the memory it asks for.
template <class S, class T>
static void run(SolverArgs<T>& a, const Batch<T>& b) {
  a.x = b.x.data();
  a.lengths = b.lengths.empty() ? nullptr : b.lengths.data();
  a.games = b.games;
  a.k = b.k;
  std::vector<double> work(S::doubles(b.k));
  std::vector<int> ints(S::ints(b.k));
  for (int g = 0; g < b.games; ++g) S::run(Solo(), a, g, work.data(), ints.data());
}

template <class T>
static double gain(const Batch<T>& b, int g, int i, const double* strategy) {
  const int n = b.lengths.empty() ? b.k : int(b.lengths[g]);
  double total = 0;
  for (int j = 0; j < n; ++j) {
    total +=
        (double(b.x[(g * b.k + i) * b.k + j]) - b.x[(g * b.k + j) * b.k + i]) / 2 * strategy[j];
  }
  return total;
}

template <class T>
static void test_solvers(std::mt19937& random, int k, bool ragged) {
  const Batch<T> b = random_games<T>(random, 30, k, ragged);
  std::vector<double> out(size_t(b.games) * k, NAN), residual(b.games, NAN), log_mu(k);
  SolverArgs<T> a{};
  a.out = out.data();
  a.residual = residual.data();

  run<Simplex>(a, b);
  for (int g = 0; g < b.games; ++g) {
    const int n = ragged ? int(b.lengths[g]) : k;
    double total = 0, most = 0;
    for (int i = 0; i < k; ++i) {
      EXPECT(out[g * k + i] >= 0 && (i < n || out[g * k + i] == 0));
      total += out[g * k + i];
      if (i < n) most = fmax(most, gain(b, g, i, &out[g * k]));
    }
    EXPECT(fabs(total - 1) < 1e-12);
    EXPECT(most < 1e-10 && fabs(most - residual[g]) < 1e-13);
  }

  a.tol = 1e-9;
  a.max_iter = 3000;
  run<Mirror>(a, b);
  for (int g = 0; g < b.games; ++g) EXPECT(residual[g] >= 0 && residual[g] < 2e-2);

  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  for (double& v : log_mu) v = log(uniform(random));
  a.log_mu = log_mu.data();
  a.tau = 0.05;
  a.max_iter = 200;
  run<Regularized>(a, b);
  for (int g = 0; g < b.games; ++g) {
    const int n = ragged ? int(b.lengths[g]) : k;
    EXPECT(residual[g] < 1e-12);
    const double level = log(out[g * k]) - log_mu[0] - gain(b, g, 0, &out[g * k]) / a.tau;
    for (int i = 1; i < n; ++i) {
      const double other = log(out[g * k + i]) - log_mu[i] - gain(b, g, i, &out[g * k]) / a.tau;
      EXPECT(fabs(other - level) < 1e-9);
    }
  }

  std::vector<char> connected(b.games);
  a.flag = reinterpret_cast<bool*>(connected.data());
  run<BradleyTerry>(a, b);
  for (int g = 0; g < b.games; ++g) {
    const int n = ragged ? int(b.lengths[g]) : k;
    for (int i = 0; i < n; ++i) {
      const double* theta = &out[g * k];
      double slope = 0, size = 0;
      for (int j = 0; j < n; ++j) {
        if (i == j) continue;
        const double won = b.x[(g * k + i) * k + j], lost = b.x[(g * k + j) * k + i];
        slope += won - (won + lost) / (1 + exp(theta[j] - theta[i]));
        size += won + lost;
      }
      EXPECT(connected[g] ? fabs(slope) < 1e-11 * size : theta[i] != theta[i]);
    }
    EXPECT(g % 3 != 0 || connected[g]);
  }

  std::vector<int64_t> winner(b.games), cycles(b.games);
  std::vector<char> smith(size_t(b.games) * k);
  a.winner = winner.data();
  a.cycles = cycles.data();
  a.smith = reinterpret_cast<bool*>(smith.data());
  run<Tournament>(a, b);
  for (int g = 0; g < b.games; ++g) {
    const int n = ragged ? int(b.lengths[g]) : k;
    const auto beats = [&](int i, int j) {
      return b.x[(g * k + i) * k + j] > b.x[(g * k + j) * k + i];
    };
    int members = 0, outsiders_beaten = 1;
    int64_t triples = 0;
    for (int i = 0; i < n; ++i) {
      members += smith[g * k + i];
      for (int j = 0; j < n; ++j) {
        if (smith[g * k + i] && !smith[g * k + j]) outsiders_beaten &= beats(i, j);
        for (int l = 0; l < n; ++l) triples += beats(i, j) && beats(j, l) && beats(l, i);
      }
    }
    EXPECT(members >= 1 && outsiders_beaten && triples == 3 * cycles[g]);
    EXPECT((winner[g] >= 0) == (members == 1 && smith[g * k + (winner[g] < 0 ? 0 : winner[g])]));
  }
}

// The thread's and the team's version of the common path agree in every bit.
template <int K, class T>
static void test_targets(std::mt19937& random) {
  std::normal_distribution<double> normal(0.0, 4.0);
  const int games = 64;
  std::vector<T> x(games * K * K);
  for (T& v : x) v = T(normal(random));
  for (int mode : {kProb, kLogit, kUclaml}) {
    std::vector<T> win(games * K), target(games * K), prob(games);
    std::vector<T> win2(games * K), target2(games * K), prob2(games), scratch(2 * K);
    std::vector<int64_t> best(games), worst(games), best2(games), worst2(games), lengths(games);
    for (int64_t& n : lengths) n = 2 + random() % (K - 1);
    TargetsArgs<T> a{x.data(),      lengths.data(), games,        K,
                     mode,          false,          1000.0,       win.data(),
                     target.data(), best.data(),    worst.data(), prob.data()};
    for (int g = 0; g < games; ++g) targets_thread<K, T>(a, g);
    a.win = win2.data();
    a.target = target2.data();
    a.best = best2.data();
    a.worst = worst2.data();
    a.prob = prob2.data();
    for (int g = 0; g < games; ++g) {
      targets_team(Solo(), a, g, scratch.data(), scratch.data() + K);
    }
    EXPECT(win == win2 && target == target2 && prob == prob2);
    EXPECT(best == best2 && worst == worst2);
    for (int g = 0; g < games; ++g) EXPECT(best[g] != worst[g]);
  }
}

template <class T>
static void test_exp(T tolerance) {
  for (int i = -1740; i <= 1740; ++i) {
    const T d = T(i) / 20;
    T p, q;
    logistic_pair<T>(d, p, q);
    const long double exact = 1.0L / (1.0L + expl(-static_cast<long double>(d)));
    const long double other = 1.0L / (1.0L + expl(static_cast<long double>(d)));
    EXPECT(fabsl(p / exact - 1) < tolerance && fabsl(q / other - 1) < tolerance);
  }
  T p, q;
  logistic_pair<T>(T(1e30), p, q);
  EXPECT(p == T(1) && q >= 0 && q < T(1e-30));
  logistic_pair<T>(T(NAN), p, q);
  EXPECT(p != p && q != q);
}

static void test_aggregate(std::mt19937& random) {
  const int games = 5, k = 7, total = 200;
  std::vector<int64_t> i(total), j(total), indptr{0, 0, 50, 60, 140, total};
  std::vector<double> outcome(total), weight(total);
  for (int c = 0; c < total; ++c) {
    i[c] = random() % k;
    j[c] = (i[c] + 1 + random() % (k - 1)) % k;
    outcome[c] = (random() % 3) / 2.0;
    weight[c] = random() % 3;
  }
  std::vector<double> p(games * k * k), counts(games * k * k), macro(games * k), micro(games * k);
  std::vector<double> sum(games * k), again(games * k * k), work(2 * k * k);
  AggregateArgs<double> a{
      i.data(), j.data(), outcome.data(), weight.data(), indptr.data(), nullptr,   games,
      k,        p.data(), counts.data(),  macro.data(),  micro.data(),  sum.data()};
  for (int g = 0; g < games; ++g) aggregate_game(a, g, work.data());
  a.p = again.data();
  for (int g = 0; g < games; ++g) aggregate_team(Solo(), a, g, work.data());
  EXPECT(p == again);
  for (int c = 0; c < k; ++c) EXPECT(macro[c] == 0.5 && sum[c] == 0);  // game 0 is empty
  double seen = 0, given = 0;
  for (double v : sum) seen += v;
  for (double v : weight) given += v;
  EXPECT(seen == 2 * given);
}

// Games whose entries lie past 2^32: the arrays are address space, only the pages touched exist.
static void test_far_games(std::mt19937& random) {
  const int k = 5;
  const int64_t games = (int64_t(1) << 32) / (k * k) + 7, far = games - 2;
  const auto reserve = [](int64_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
  };
  float* x = static_cast<float*>(reserve(games * k * k * 4));
  float* win = static_cast<float*>(reserve(games * k * 4));
  double* strategy = static_cast<double*>(reserve(games * k * 8));
  double* residual = static_cast<double*>(reserve(games * 8));
  if (!x || !win || !strategy || !residual) {
    printf("far games: not run, address space is limited here\n");
    return;
  }
  const Batch<float> b = random_games<float>(random, 1, k, false);
  for (int c = 0; c < k * k; ++c) x[far * k * k + c] = b.x[c];
  TargetsArgs<float> t{};
  t.x = x;
  t.games = games;
  t.k = k;
  t.mode = kProb;
  t.win = win;
  targets_thread<k, float>(t, far);
  std::vector<float> near(k), scratch(2 * k);
  t.x = b.x.data();
  t.win = near.data();
  targets_team(Solo(), t, 0, scratch.data(), scratch.data() + k);
  for (int i = 0; i < k; ++i) EXPECT(win[far * k + i] == near[i]);

  SolverArgs<float> a{};
  a.x = x;
  a.games = games;
  a.k = k;
  a.out = strategy;
  a.residual = residual;
  std::vector<double> work(Simplex::doubles(k));
  std::vector<int> ints(Simplex::ints(k));
  Simplex::run(Solo(), a, far, work.data(), ints.data());
  double total = 0;
  for (int i = 0; i < k; ++i) total += strategy[far * k + i];
  EXPECT(fabs(total - 1) < 1e-12 && residual[far] < 1e-12);
}

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? unsigned(strtoul(argv[1], nullptr, 10)) : 0;
  std::mt19937 random(seed);
  for (bool ragged : {false, true}) {
    for (int k : {2, 5, 9, 33}) {
      test_solvers<double>(random, k, ragged);
      test_solvers<float>(random, k, ragged);
    }
  }
  test_solvers<double>(random, 67, true);  // more than one word in the tournament's bit sets
  test_targets<2, float>(random);
  test_targets<5, float>(random);
  test_targets<8, double>(random);
  test_targets<19, float>(random);
  test_exp<float>(4e-7f);
  test_exp<double>(1e-15);
  test_aggregate(random);
  test_far_games(random);
  printf("seed %u: %d failures\n", seed, failures);
  return failures != 0;
}
