package disk

import (
	"encoding/json"
	"errors"
	"os"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// seedLabel is the name of a volume in which cloud-init looks for its data source
// NoCloud.
const seedLabel = "cidata"

// Seed is what cloud-init is told when a full disk image boots first: the files
// of its data source NoCloud.
type Seed struct {
	UserData      []byte // "#cloud-config" or a script; empty: nothing to do
	MetaData      []byte // see MetaData
	NetworkConfig []byte // see NetworkConfig; nil: DHCP, as cloud-init does by itself
	// VendorData is what the machine's maker has to say besides the user; nil:
	// nothing. See AgentData.
	VendorData []byte
}

// maxSeed bounds the bytes of one file of a seed.
const maxSeed = 1 << 20

// WriteSeed writes an ISO 9660 image with the seed, which the machine is given as
// a disk that it cannot write. It replaces what is at path.
func WriteSeed(path string, s Seed) error {
	const op = "disk.WriteSeed"
	files := []isoFile{{"meta-data", s.MetaData}} // in the order of their names, as a directory has to be
	if s.NetworkConfig != nil {
		files = append(files, isoFile{"network-config", s.NetworkConfig})
	}
	files = append(files, isoFile{"user-data", s.UserData})
	if s.VendorData != nil {
		files = append(files, isoFile{"vendor-data", s.VendorData})
	}
	for _, f := range files {
		if len(f.data) > maxSeed {
			return sandbox.Errorf(op, sandbox.Invalid, f.name, "%d bytes, at most %d are possible", len(f.data), maxSeed)
		}
	}
	if err := os.WriteFile(path, isoImage(seedLabel, files), 0o600); err != nil {
		return sandbox.E(op, kindOf(err), path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

// MetaData names a machine. cloud-init does its work once for each instance.
func MetaData(instance, hostname string) ([]byte, error) {
	// JSON is YAML, and needs no care with quotes.
	return json.Marshal(map[string]string{"instance-id": instance, "local-hostname": hostname})
}

// NetworkConfig tells cloud-init the address of the machine's interface, which it
// finds by the MAC address. It is in the form that all systems' ways of configuring a
// network know how to follow to the default route.
func NetworkConfig(n wire.MachineNetwork) ([]byte, error) {
	if n.MAC == "" || !n.Address.IsValid() {
		return nil, sandbox.Errorf("disk.NetworkConfig", sandbox.Invalid, "", "a network without a MAC address or an address")
	}
	subnet := map[string]any{"type": "static", "address": n.Address.String()}
	if n.Gateway.IsValid() {
		subnet["gateway"] = n.Gateway
	}
	if n.Resolver.IsValid() {
		subnet["dns_nameservers"] = []any{n.Resolver}
	}
	eth := map[string]any{"type": "physical", "name": "eth0", "mac_address": n.MAC, "subnets": []any{subnet}}
	if n.MTU != 0 {
		eth["mtu"] = n.MTU
	}
	return json.Marshal(map[string]any{"version": 1, "config": []any{eth}})
}
