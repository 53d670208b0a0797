// What every kernel of minisb shares.  Prepended to each .cu file before it is compiled.
#pragma once
