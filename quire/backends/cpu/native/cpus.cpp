// How many CPUs this process may use: those that its affinity allows (a cpuset shows there too), and no more than its
// control group's quota is worth. A quota binds everything below it, so the least on the way from the process's own
// group to the top counts. https://docs.kernel.org/admin-guide/cgroup-v2.html, .../scheduler/sched-bwc.html
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#include "threads.h"

namespace quire {
namespace {

// CPUs of one group's quota; 0 where it has none. Version 2 keeps "max 100000" or "150000 100000" (microseconds in a
// period) in cpu.max; version 1 has a file for each, and -1 for no quota.
double quota_of(const std::string& group) {
    double quota = 0, period = 0;
    if (std::ifstream file(group + "/cpu.max"); file) {
        if (!(file >> quota >> period)) return 0;
    } else {
        std::ifstream(group + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(group + "/cpu.cfs_period_us") >> period;
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

// The least quota from mount + path up to the mount. Where a container sees only its own part of the tree, the path may
// be one of the host, and lead nowhere: what is left is the mount itself, which is the container's group then.
double least_quota(const std::string& mount, std::string path) {
    double least = 0;
    for (;;) {
        const double quota = path.find("/..") == std::string::npos ? quota_of(mount + path) : 0;
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
        if (path.empty()) return least;
        path.erase(path.rfind('/'));
    }
}

}  // namespace

double cpu_quota(const std::string& root) {
    const std::string base = root + (root.empty() || root.back() != '/' ? "/" : ""), mount = base + "sys/fs/cgroup";
    double least = 0;
    const auto consider = [&least](double quota) {
        if (quota > 0 && (least == 0 || quota < least)) least = std::max(quota, 0.01);
    };
    // Lines of "number:controllers:path": number 0 without controllers is version 2.
    std::ifstream groups(base + "proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        const size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        std::string path = line.substr(second + 1);
        if (path.empty() || path == "/" || path[0] != '/') path.clear();
        if (controllers.empty()) {
            consider(least_quota(mount, path));
            consider(least_quota(mount + "/unified", path));   // beside version 1
            continue;
        }
        std::istringstream names(controllers);
        for (std::string name; std::getline(names, name, ',');)
            if (name == "cpu") {
                consider(least_quota(mount + "/cpu", path));
                consider(least_quota(mount + "/" + controllers, path));
            }
    }
    return least;
}

int default_num_threads() {
    int cpus = 0;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
    if (cpus <= 0) cpus = static_cast<int>(std::thread::hardware_concurrency());
    // Rounded up: 1.5 CPUs are two threads for three quarters of the time, which is more than one thread all the time.
    if (const double quota = cpu_quota(); quota > 0 && quota < cpus) cpus = static_cast<int>(std::ceil(quota));
    return std::clamp(cpus, 1, kMaxThreads);
}

}  // namespace quire
