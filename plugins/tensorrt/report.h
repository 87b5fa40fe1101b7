// Where errors go: TensorRT's error recorder when a plugin has one, its logger otherwise. Never the exit.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace rotexport {

// Takes note of the application's logger; nullptr forgets it.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Reports a failure of `who`.
void report(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, const std::string& who,
            const std::string& what) noexcept;

}  // namespace rotexport
