// A battery over the CPU kernels' normals, in the orders that users' noise is made in.
//
// Streams: the elements of one weight, along rows and down columns; weights of many layers, steps,
// draws and seeds 0, 1, 2, ... Of each: moments, Kolmogorov-Smirnov and chi-square, tails, serial
// correlation of z and z^2, and correlation with the stream's neighbour at the same coordinates.
// Each statistic is turned into the deviate of a standard normal; one beyond kLimit is a failure.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace flatkern::cpu {
const Kernels& kernels();
}

namespace {

using flatkern::NoiseKey;

// Two-sided, a standard normal is beyond it with probability 5.7e-7.
constexpr double kLimit = 5.0;
constexpr int64_t kRows = 64, kCols = 1024, kBlock = kRows * kCols;
constexpr int kBinsPerUnit = 256, kEnd = 7, kBins = 2 * kEnd * kBinsPerUnit;
constexpr std::array<int64_t, 9> kLags = {1, 2, 3, 4, 5, 8, 64, kCols, 4 * kCols};
constexpr std::array<double, 6> kTails = {3.0, 3.5, 4.0, 4.5, 5.0, 5.5};

int statistics = 0, failures = 0;
double worst = 0;

void report(const std::string& stream, const std::string& what, double deviate) {
  ++statistics;
  const bool failed = !(std::fabs(deviate) <= kLimit);
  failures += failed;
  if (std::fabs(deviate) > worst) worst = std::fabs(deviate);
  if (failed) std::printf("FAILED %s: %s, %.2f\n", stream.c_str(), what.c_str(), deviate);
}

double normal_tail(double x) { return 0.5 * std::erfc(x / std::sqrt(2.0)); }

// The deviate that a normal exceeds with probability p.
double deviate_of(double p) {
  double low = 0, high = 40;
  if (p >= 0.5) return 0;
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (normal_tail(middle) > p ? low : high) = middle;
  }
  return low;
}

// Of a Poisson count, by its exact tail sums.
double poisson_deviate(double count, double mean) {
  if (mean > 1e5) return (count - mean) / std::sqrt(mean);
  double p = 0;
  const bool above = count >= mean;
  for (int64_t k = static_cast<int64_t>(count); k >= 0; above ? ++k : --k) {
    const double term = std::exp(k * std::log(mean) - mean - std::lgamma(k + 1.0));
    p += term;
    if (term < 1e-18 * p || (term == 0 && p == 0)) break;
  }
  return (above ? 1 : -1) * deviate_of(p);
}

struct Stream {
  std::string name;
  // The key and the first row of block i, and of its neighbour.
  std::function<std::pair<NoiseKey, uint64_t>(uint32_t)> at, neighbour;
  bool down_columns = false;
};

void fill(const std::pair<NoiseKey, uint64_t>& place, std::vector<float>& out) {
  const flatkern::cpu::NoiseArgs args = {{place.first, kRows, kCols, place.second, 0}, out.data()};
  flatkern::cpu::kernels().noise(args, 0, kRows * flatkern::cpu::blocks_per_row(kCols));
}

void run(const Stream& stream, int64_t blocks) {
  // What the longest lag looks back at, and the block behind it.
  constexpr int64_t kBack = kLags.back();
  std::vector<float> z(kBack + kBlock, 0.0f), block(kBlock), other(kBlock);
  std::vector<int64_t> bins(kBins + 2, 0);
  std::array<double, 6> powers{};
  std::array<double, kLags.size()> products{}, squares{};
  std::array<double, kTails.size()> beyond{};
  double cross = 0, cross_squares = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    std::copy(z.end() - kBack, z.end(), z.begin());
    fill(stream.at(b), block);
    for (int64_t i = 0; i < kBlock; ++i) {
      z[kBack + i] = stream.down_columns ? block[i % kRows * kCols + i / kRows] : block[i];
    }
    const float* now = z.data() + kBack;
    double sums[6] = {};
    for (int64_t i = 0; i < kBlock; ++i) {
      const double x = now[i], x2 = x * x;
      sums[0] += x;
      sums[1] += x2 - 1;
      sums[2] += x2 * x;
      sums[3] += x2 * x2 - 3;
      sums[4] += x2 * x2 * x;
      sums[5] += x2 * x2 * x2 - 15;
      const int bin = static_cast<int>((x + kEnd) * kBinsPerUnit) + 1;
      ++bins[std::clamp(bin, 0, kBins + 1)];
    }
    for (int k = 0; k < 6; ++k) powers[k] += sums[k];
    for (size_t t = 0; t < kTails.size(); ++t) {
      int64_t count = 0;
      for (int64_t i = 0; i < kBlock; ++i) count += std::fabs(now[i]) > kTails[t];
      beyond[t] += count;
    }
    if (b > 0) {
      for (size_t l = 0; l < kLags.size(); ++l) {
        const float* before = now - kLags[l];
        double sum = 0, sum2 = 0;
        for (int64_t i = 0; i < kBlock; ++i) {
          const double x = now[i], y = before[i];
          sum += x * y;
          sum2 += (x * x - 1) * (y * y - 1);
        }
        products[l] += sum;
        squares[l] += sum2;
      }
    }
    fill(stream.neighbour(b), other);
    for (int64_t i = 0; i < kBlock; ++i) {
      const double x = block[i], y = other[i];
      cross += x * y;
      cross_squares += (x * x - 1) * (y * y - 1);
    }
  }

  const double n = static_cast<double>(blocks) * kBlock, pairs = n - kBlock;
  // Variances of the powers of a normal.
  const double variances[6] = {1, 2, 15, 96, 945, 10170};
  for (int k = 0; k < 6; ++k) {
    report(stream.name, "moment " + std::to_string(k + 1), powers[k] / std::sqrt(n * variances[k]));
  }
  double below = bins[0], farthest = 0, chi = 0, kept = 0, left_count = bins[0];
  double left_mass = normal_tail(kEnd);
  for (int i = 1; i <= kBins; ++i) {
    const double low = static_cast<double>(i - 1) / kBinsPerUnit - kEnd;
    const double high = low + 1.0 / kBinsPerUnit;
    below += bins[i];
    farthest = std::max(farthest, std::fabs(below / n - (1 - normal_tail(high))));
    left_count += bins[i];
    // From the nearer end: no digits are lost in the tails.
    left_mass += low < 0 ? normal_tail(-high) - normal_tail(-low) : normal_tail(low) - normal_tail(high);
    if (left_mass * n >= 25) {
      chi += (left_count - left_mass * n) * (left_count - left_mass * n) / (left_mass * n);
      ++kept;
      left_count = left_mass = 0;
    }
  }
  report(stream.name, "Kolmogorov-Smirnov", deviate_of(std::exp(-2 * n * farthest * farthest)));
  // Wilson and Hilferty; one sum is given.
  const double df = kept - 1, spread = 2 / (9 * df);
  report(stream.name, "chi-square", (std::cbrt(chi / df) - (1 - spread)) / std::sqrt(spread));
  for (size_t t = 0; t < kTails.size(); ++t) {
    const double mean = 2 * n * normal_tail(kTails[t]);
    report(stream.name, "beyond " + std::to_string(kTails[t]), poisson_deviate(beyond[t], mean));
  }
  for (size_t l = 0; l < kLags.size(); ++l) {
    const std::string lag = std::to_string(kLags[l]);
    report(stream.name, "correlation at lag " + lag, products[l] / std::sqrt(pairs));
    report(stream.name, "of squares at lag " + lag, squares[l] / std::sqrt(4 * pairs));
  }
  report(stream.name, "correlation with the neighbour", cross / std::sqrt(n));
  report(stream.name, "of squares with the neighbour", cross_squares / std::sqrt(4 * n));
}

}  // namespace

int main(int argc, char** argv) {
  const double wanted = argc > 1 ? std::atof(argv[1]) : 1.2e9;
  const uint32_t seed = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0;
  const auto key = [&](uint32_t s, uint32_t step, uint32_t draw, uint32_t tensor) {
    return std::pair<NoiseKey, uint64_t>(NoiseKey{seed + s, step, draw, tensor}, 0);
  };
  const auto rows = [&](uint32_t i, uint64_t shift) {
    return std::pair<NoiseKey, uint64_t>(NoiseKey{seed, 0, 0, 0}, uint64_t{i} * kRows + shift);
  };
  const std::vector<Stream> streams = {
      {"one weight, along rows", [&](uint32_t i) { return rows(i, 0); },
       [&](uint32_t i) { return rows(i, 1); }},
      {"one weight, down columns", [&](uint32_t i) { return rows(i, 0); },
       [&](uint32_t i) { return rows(i, kRows); }, true},
      {"layers", [&](uint32_t i) { return key(0, 0, 0, i); },
       [&](uint32_t i) { return key(0, 0, 0, i + 1); }},
      {"adapters", [&](uint32_t i) { return key(0, 0, 0, (1u << 31) + i); },
       [&](uint32_t i) { return key(0, 0, 0, i); }},
      {"steps", [&](uint32_t i) { return key(0, i, 0, 7); },
       [&](uint32_t i) { return key(0, i + 1, 0, 7); }},
      {"draws", [&](uint32_t i) { return key(0, 0, i, 7); },
       [&](uint32_t i) { return key(0, 0, i + 1, 7); }},
      {"ranks", [&](uint32_t i) { return key(0, 0, i << 16, 7); },
       [&](uint32_t i) { return key(0, 0, (i + 1) << 16, 7); }},
      {"seeds", [&](uint32_t i) { return key(i, 0, 0, 0); },
       [&](uint32_t i) { return key(i + 1, 0, 0, 0); }},
      {"seed and step exchanged", [&](uint32_t i) { return key(i, i + 1, 0, 0); },
       [&](uint32_t i) { return key(i + 1, i, 0, 0); }},
      {"draw and tensor exchanged", [&](uint32_t i) { return key(0, 0, i, i + 1); },
       [&](uint32_t i) { return key(0, 0, i + 1, i); }},
  };
  const int64_t blocks = static_cast<int64_t>(wanted / kBlock / streams.size()) + 1;
  for (const Stream& stream : streams) run(stream, blocks);
  std::printf("%s: %.3g normals of %zu streams from seed %u, %d statistics, largest deviate %.2f\n",
              flatkern::cpu::kernels().name, static_cast<double>(blocks) * kBlock * streams.size(),
              streams.size(), seed, statistics, worst);
  std::printf("a right generator has one beyond %.0f in %.1e of all seeds; here: %d\n", kLimit,
              statistics * 5.7e-7, failures);
  return failures != 0;
}
