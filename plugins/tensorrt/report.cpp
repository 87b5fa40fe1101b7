#include "tensorrt/report.h"

#include <atomic>

namespace rotexport {
namespace {

std::atomic<nvinfer1::ILoggerFinder*>& finder() {
  static std::atomic<nvinfer1::ILoggerFinder*> value{nullptr};
  return value;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* value) { finder() = value; }

void report(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, const std::string& who,
            const std::string& what) noexcept {
  try {
    const std::string message = "rotexport: " + who + ": " + what;
    if (recorder) {
      recorder->reportError(code, message.c_str());
      return;
    }
    nvinfer1::ILoggerFinder* found = finder();
    nvinfer1::ILogger* logger = found ? found->findLogger() : nullptr;
    if (logger) logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } catch (...) {  // out of memory: the caller's return value still says that it failed
  }
}

}  // namespace rotexport
