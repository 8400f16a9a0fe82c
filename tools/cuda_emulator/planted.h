// A small kernel with bugs to plant, one at a time: does the emulator find them?
#pragma once

#include <string>
#include <vector>

std::vector<float> run_planted(const std::string& bug, const std::string& order);
