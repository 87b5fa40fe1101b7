// The outcome of a launch: success, or a message that stays valid for the life of the program or thread.
#pragma once

struct Status {
  const char* message = nullptr;  // nullptr: success

  explicit operator bool() const { return message == nullptr; }
};
