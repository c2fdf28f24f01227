// Makes torch believe that there is one CUDA device, so that tensors without data can be "on" it.
// Nothing reaches a device. Waits and events are reported, see `device.py`. Load it before torch.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

void (*report)(const char* what, intptr_t event) = nullptr;
intptr_t events = 0;

struct NoDevice final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(++events);
    report("record", events);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override { report("event", reinterpret_cast<intptr_t>(event)); }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};

// Autograd asks these for the accelerator. torch looks for a class of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

// These take precedence over the hooks that a torch built with CUDA registers when it is loaded.
using Registerer = at::RegistererCUDAHooksRegistry;
Registerer hooks("CUDAHooks", c10::REGISTRY_PREFERRED, at::CUDAHooksRegistry(), Registerer::DefaultCreator<CUDAHooks>);

}  // namespace

// Call it after torch is loaded: torch's own guard would replace an earlier one.
extern "C" void stand_guard(void (*reporting)(const char*, intptr_t)) {
  report = reporting;
  static c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new NoDevice());
}
