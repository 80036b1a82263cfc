// Prints what csrc/schedule.cu makes of documents: ``print_schedule rows causal length…``, a tile a line.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "schedule.h"

int main(int count, char** words) {
  const int rows = std::atoi(words[1]), documents = count - 3;
  std::vector<int> offsets{0};
  int tiles = 0;
  for (int i = 0; i < documents; i++) {
    const int length = std::atoi(words[3 + i]);
    offsets.push_back(offsets.back() + length), tiles += (length + rows - 1) / rows;
  }
  std::vector<int> out(2 + 2 * tiles, -1);
  if (phi4rv::schedule(offsets.data(), documents, rows, std::atoi(words[2]), tiles, out.data(), nullptr)) return 1;
  if (out[0] != tiles) return 2;
  for (int i = 0; i < tiles; i++) std::printf("%d %d\n", out[2 + 2 * i], out[3 + 2 * i]);
}
